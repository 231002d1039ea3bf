//! What a file of a hub is named by: the digest of its content.
//!
//! ```text
//! large files (LFS, Xet)   SHA-256 of the content                          64 digits
//! others                   SHA-1 of "blob <size>\0" and the content (git)  40 digits
//! ```

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// Goes over a file's content.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
    /// A name that is no digest, as some mirrors give them: only the size can be checked.
    Unknown,
}

impl Hasher {
    /// For a file of a name and a size.
    pub(crate) fn new(name: &str, size: u64) -> Self {
        let hex = name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match name.len() {
            64 if hex => Self::Sha256(Sha256::new()),
            40 if hex => {
                let mut sha = Sha1::new();
                sha.update(format!("blob {size}\0"));
                Self::Git(sha)
            }
            _ => Self::Unknown,
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(sha) => sha.update(bytes),
            Self::Git(sha) => sha.update(bytes),
            Self::Unknown => {}
        }
    }

    /// Whether the content is the one of the name.
    pub(crate) fn is(self, name: &str) -> bool {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        match self {
            Self::Sha256(sha) => hex(&sha.finalize()) == name,
            Self::Git(sha) => hex(&sha.finalize()) == name,
            Self::Unknown => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_of_lfs() {
        let is = |name: &str, size: u64, content: &[u8]| {
            let mut hasher = Hasher::new(name, size);
            content.chunks(2).for_each(|part| hasher.update(part));
            hasher.is(name)
        };
        // `printf hello | git hash-object --stdin`, `printf hello | sha256sum`.
        assert!(is("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", 5, b"hello"));
        assert!(is("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", 5, b"hello"));
        assert!(!is("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", 5, b"jello"));
        assert!(!is("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", 5, b"hell"));
        assert!(is("an-etag-of-a-mirror", 5, b"hello"));
    }
}
