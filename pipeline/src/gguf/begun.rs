//! A GGUF file that is being written: which of its bytes are there for good, so that an interrupted export goes on after them.
//!
//! ```text
//! OUT/.llmpress/model-TYPE.gguf        header | group | group | ...     synced group by group
//! OUT/.llmpress/model-TYPE.gguf.json   [{offset, bytes, blake3}, ...]   one for each group that was synced
//! ```
//!
//! A group is hashed again before it is believed.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use llmpress_formats::{Digest, Error as FormatError, GgufLayout, read_small_file, write_atomic};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::progress::Silent;
use crate::{Error, Result};

/// Bytes of a group, unless the file would have too many.
const GROUP_BYTES: u64 = 8 << 20;
/// About how many groups a file has at most.
const GROUPS: u64 = 256;
const MAX_MARKS_BYTES: u64 = 16 << 20;

/// A group of bytes that was synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    offset: u64,
    bytes: u64,
    blake3: Digest,
}

/// The file under its hidden name.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) file: File,
    pub(super) path: PathBuf,
    marks: Vec<Mark>,
    group_bytes: u64,
}

impl Begun {
    /// Takes up the file at `path`, or what an earlier run published at `published`, where it is of this layout; else begins it.
    pub(super) fn open(path: &Path, published: &Path, layout: &GgufLayout) -> Result<Self> {
        if !path.exists() && published.exists() {
            // Its run was killed before it could say that all was complete.
            std::fs::rename(published, path).map_err(|e| FormatError::io(published, "rename", e))?;
        }
        let group_bytes = (layout.bytes() / GROUPS).max(GROUP_BYTES);
        if let Some(file) = of_layout(path, layout) {
            let mut begun = Self { file, path: path.to_owned(), marks: Vec::new(), group_bytes };
            begun.marks = begun.believed(layout);
            return Ok(begun);
        }
        for old in [path.to_owned(), marks_of(path)] {
            match std::fs::remove_file(&old) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(FormatError::io(&old, "remove", e).into());
                }
                _ => {}
            }
        }
        let io = |what: &'static str| move |e| FormatError::io(path, what, e);
        let file =
            File::options().read(true).write(true).create_new(true).open(path).map_err(io("create"))?;
        file.set_len(layout.bytes()).map_err(io("write"))?;
        file.write_all_at(layout.header(), 0).map_err(io("write"))?;
        Ok(Self { file, path: path.to_owned(), marks: Vec::new(), group_bytes })
    }

    /// The marks whose bytes are what they say.
    fn believed(&self, layout: &GgufLayout) -> Vec<Mark> {
        let Ok(bytes) = read_small_file(&marks_of(&self.path), MAX_MARKS_BYTES) else { return Vec::new() };
        let marks: Vec<Mark> = serde_json::from_slice(&bytes).unwrap_or_default();
        let holds = |mark: &Mark| {
            mark.offset.checked_add(mark.bytes).is_some_and(|end| end <= layout.bytes())
                && self.digest(mark.offset..mark.offset + mark.bytes).is_ok_and(|found| found == mark.blake3)
        };
        marks.into_iter().filter(holds).collect()
    }

    /// Whether an earlier run wrote these bytes.
    pub(super) fn holds(&self, bytes: &Range<u64>) -> bool {
        self.marks.iter().any(|mark| mark.offset <= bytes.start && bytes.end <= mark.offset + mark.bytes)
    }

    /// How many bytes earlier runs wrote.
    pub(super) fn held(&self) -> u64 {
        self.marks.iter().map(|mark| mark.bytes).sum()
    }

    /// Bytes after which a group is synced and marked.
    pub(super) fn group_bytes(&self) -> u64 {
        self.group_bytes
    }

    /// These bytes are written: syncs them and writes it down.
    pub(super) fn mark(&mut self, bytes: Range<u64>) -> Result<()> {
        self.file.sync_data().map_err(|e| FormatError::io(&self.path, "sync", e))?;
        let blake3 = self.digest(bytes.clone())?;
        self.marks.push(Mark { offset: bytes.start, bytes: bytes.end - bytes.start, blake3 });
        let path = marks_of(&self.path);
        let json = serde_json::to_vec(&self.marks)
            .map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))?;
        Ok(write_atomic(&path, &json)?)
    }

    /// The digest of some of its bytes.
    pub(super) fn digest(&self, bytes: Range<u64>) -> Result<Digest> {
        let read = |at: u64, piece: &mut [u8]| {
            let read = self.file.read_exact_at(piece, bytes.start + at);
            read.map_err(|e| FormatError::io(&self.path, "read", e))
        };
        Ok(crate::complete::digest(bytes.end - bytes.start, read, &Silent)?)
    }
}

/// Where the marks of a file lie.
fn marks_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// A file that has this layout's size and header.
fn of_layout(path: &Path, layout: &GgufLayout) -> Option<File> {
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let file = File::options().read(true).write(true).custom_flags(flags).open(path).ok()?;
    let mut header = vec![0; layout.header().len()];
    file.read_exact_at(&mut header, 0).ok()?;
    let same = header == layout.header() && file.metadata().is_ok_and(|meta| meta.len() == layout.bytes());
    same.then_some(file)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use llmpress_formats::encoding::ggml::Blocks;
    use llmpress_formats::{GgufTensor, GgufValue};

    use super::*;

    fn layout(values: u64) -> GgufLayout {
        let keys = [("general.architecture".to_owned(), GgufValue::Text("llama".to_owned()))];
        GgufLayout::new(
            &keys,
            &[GgufTensor { name: "a".to_owned(), blocks: Blocks::F32, shape: vec![values] }],
        )
        .unwrap()
    }

    #[test]
    fn what_was_marked_is_held_unless_it_was_changed_or_the_layout_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let (path, published) = (dir.path().join("hidden.gguf"), dir.path().join("m.gguf"));
        let one = layout(1000);
        let start = one.offset(0).unwrap();
        let open = |layout: &GgufLayout| Begun::open(&path, &published, layout).unwrap();
        let mut begun = open(&one);
        assert_eq!(begun.held(), 0);
        begun.file.write_all_at(&[1; 4000], start).unwrap();
        begun.mark(start..start + 1000).unwrap();
        begun.mark(start + 1000..start + 2000).unwrap();
        drop(begun);
        let begun = open(&one);
        assert!(begun.held() == 2000 && begun.holds(&(start + 8..start + 1000)));
        assert!(!begun.holds(&(start + 1990..start + 2001)));
        begun.file.write_all_at(&[2], start + 1500).unwrap();
        drop(begun);
        // Published, but the run was killed before it had said so.
        std::fs::rename(&path, &published).unwrap();
        let begun = open(&one);
        assert!(begun.held() == 1000 && !published.exists());
        assert!(!begun.holds(&(start + 1000..start + 2000)));
        drop(begun);
        std::fs::write(marks_of(&path), "[{\"offset\":18446744073709551615,\"bytes\":9}]").unwrap();
        assert_eq!(open(&one).held(), 0);
        let other = open(&layout(1001));
        assert!(other.held() == 0 && !marks_of(&path).exists());
        let mut byte = [9];
        other.file.read_exact_at(&mut byte, layout(1001).offset(0).unwrap()).unwrap();
        assert_eq!(byte, [0]);
    }
}
