//! The name of a checkpoint on a hub.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// What says that a name is one on a hub, where it could be a path as well.
const SCHEME: &str = "hf://";
/// The longest name of a repository or a revision.
const MOST: usize = 256;
/// What is taken where no revision is said.
const MAIN: &str = "main";

/// `org/name`, or `org/name@revision`: a branch, a tag or a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    repository: String,
    revision: String,
}

impl Id {
    /// The repository: `org/name`, or a name alone for the oldest ones.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The revision; `main` where none was said.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Whether a text could be one: `hf://...`, or two plain words with one `/` between them. A path can look so, too.
    pub fn looks_like_one(text: &str) -> bool {
        text.starts_with(SCHEME) || (text.matches('/').count() == 1 && text.parse::<Self>().is_ok())
    }

    /// Whether the revision is a commit, which never changes.
    pub(crate) fn commit(&self) -> Option<&str> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        (self.revision.len() == 40 && self.revision.bytes().all(hex)).then_some(self.revision.as_str())
    }
}

impl FromStr for Id {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |what: &str| Error::Invalid(format!("{text:?} is no checkpoint of a hub: {what}"));
        let scheme = text.strip_prefix(SCHEME);
        let rest = scheme.unwrap_or(text);
        let (repository, revision) = rest.split_once('@').unwrap_or((rest, MAIN));
        let words: Vec<&str> = repository.split('/').collect();
        let fits = if scheme.is_some() { words.len() <= 2 } else { words.len() == 2 };
        if !fits || repository.len() > MOST || !words.iter().all(|word| is_word(word)) {
            return Err(bad("it is org/name or org/name@revision, of letters, digits, '.', '_' and '-'"));
        }
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        let steers = |c: char| c.is_control() || c == '\\';
        if revision.len() > MOST || !revision.split('/').all(plain) || revision.contains(steers) {
            return Err(bad("its revision is a branch, a tag or a commit"));
        }
        Ok(Self { repository: repository.to_owned(), revision: revision.to_owned() })
    }
}

fn is_word(word: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !word.is_empty()
        && word.bytes().all(plain)
        && !word.starts_with(['.', '-'])
        && !word.ends_with(['.', '-'])
        && !word.contains("..")
        && !word.contains("--")
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            MAIN => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

/// A part of a URL's path: everything but letters, digits and what is harmless is escaped, `/` too.
pub(crate) fn escaped(part: &str) -> String {
    let mut out = String::with_capacity(part.len());
    for byte in part.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_revisions_are_told_from_paths() {
        for (text, repository, revision) in [
            ("org/name", "org/name", "main"),
            ("org/na.me_1-B@v1.0", "org/na.me_1-B", "v1.0"),
            ("hf://gpt2", "gpt2", "main"),
            ("hf://org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ] {
            let id: Id = text.parse().unwrap();
            assert_eq!((id.repository(), id.revision()), (repository, revision));
            assert!(Id::looks_like_one(text), "{text}");
            assert_eq!(id.to_string(), text.strip_prefix("hf://").unwrap_or(text));
        }
        for path in [
            "gpt2",
            "./name",
            "../name",
            "/abs/name",
            "a/b/c",
            "a/",
            "/a",
            "a//b",
            "a b/c",
            "",
            "a/b.",
            "a/..",
            "~/m",
        ] {
            assert!(!Id::looks_like_one(path), "{path}");
        }
        for text in ["a/b@", "a/b@..", "a/b@x/../y", "a/b@\n", "a/b@/x", "hf://a/b/c", "hf://"] {
            assert!(text.parse::<Id>().is_err(), "{text}");
        }
        assert_eq!(
            "a/b@0123456789abcdef0123456789abcdef01234567".parse::<Id>().unwrap().commit().map(str::len),
            Some(40)
        );
        assert_eq!("a/b@main".parse::<Id>().unwrap().commit(), None);
    }

    #[test]
    fn what_steers_a_url_is_escaped() {
        assert_eq!(escaped("refs/pr/3"), "refs%2Fpr%2F3");
        assert_eq!(escaped("a b?c#d%é"), "a%20b%3Fc%23d%25%C3%A9");
    }
}
