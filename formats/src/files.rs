//! Files: bounded reads that cannot hang, and writes that are there whole or not at all.
//!
//! ```text
//! read:   a regular file, behind a link or not            never a FIFO, a socket, a device
//! write:  .llmpress-<digest of the name>.tmp --> name     created anew, no link is followed
//! ```

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::{Digest, Error, Result};

/// How a Git LFS pointer begins: what a clone without LFS leaves in place of a large file.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Only a name: no way out of the directory.
pub(crate) fn is_plain_name(file: &str) -> bool {
    !file.is_empty() && !file.contains(['/', '\\', '\0']) && file != "." && file != ".." && file.len() <= 255
}

/// The error for a link to nothing.
pub(crate) fn dangling(path: &Path) -> Error {
    Error::corrupt(path, None, "is a link to a file that is not there: download it, or remove the link")
}

/// Opens a regular file for reading. Links are followed; whatever else stands there (a FIFO, which would wait for a
/// writer, a socket, a directory) is refused.
pub fn open_file(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| Error::io(path, "open", e))?;
    let meta = file.metadata().map_err(|e| Error::io(path, "examine", e))?;
    if !meta.is_file() {
        return Err(Error::corrupt(
            path,
            None,
            "is not a file: a directory, FIFO, socket or device is there",
        ));
    }
    Ok(file)
}

/// Reads a regular file of at most `limit` bytes. What a GGUF file makes of its metadata is read as if it lay in it.
pub fn read_small_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    if let Some(made) = crate::gguf::within(path) {
        return made?.ok_or_else(|| Error::io(path, "open", std::io::ErrorKind::NotFound.into()));
    }
    let bytes = read_all(path, open_file(path)?, limit)?;
    refuse_lfs_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Reads what a person named: at most `limit` bytes of a file, a FIFO or a terminal.
pub fn read_input(path: &Path, limit: u64) -> Result<Vec<u8>> {
    read_all(path, File::open(path).map_err(|e| Error::io(path, "open", e))?, limit)
}

fn read_all(path: &Path, file: File, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| Error::io(path, "read", e))?;
    if bytes.len() as u64 > limit {
        return Err(Error::corrupt(
            path,
            None,
            format!("is larger than {limit} bytes, the most that is read"),
        ));
    }
    Ok(bytes)
}

/// Refuses the beginning of a file that is a Git LFS pointer.
pub(crate) fn refuse_lfs_pointer(path: &Path, start: &[u8]) -> Result<()> {
    if start.starts_with(LFS_POINTER) {
        return Err(Error::corrupt(
            path,
            None,
            "is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory",
        ));
    }
    Ok(())
}

const TEMPORARY_PREFIX: &str = ".llmpress-";
const TEMPORARY_SUFFIX: &str = ".tmp";
/// Digits of the digest in the name of a temporary file.
const TEMPORARY_DIGITS: usize = 16;

/// The name under which `path` is written before it is complete: hidden, so that it is no file of a checkpoint, and short
/// whatever the length of the name.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default();
    let digest = Digest::of(name.as_encoded_bytes()).to_string();
    path.with_file_name(format!("{TEMPORARY_PREFIX}{}{TEMPORARY_SUFFIX}", &digest[..TEMPORARY_DIGITS]))
}

/// Whether an interrupted write leaves files of this name.
pub fn is_temporary_name(name: &str) -> bool {
    name.strip_prefix(TEMPORARY_PREFIX)
        .and_then(|rest| rest.strip_suffix(TEMPORARY_SUFFIX))
        .is_some_and(|d| d.len() == TEMPORARY_DIGITS && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Creates a file that is surely new: what stands at `path`, a link perhaps, is removed and never followed.
pub(crate) fn create_anew(path: &Path) -> Result<File> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound && path.symlink_metadata().is_ok() => {
            return Err(Error::io(path, "remove", e));
        }
        _ => {}
    }
    let created = OpenOptions::new().read(true).write(true).create_new(true).open(path);
    created.map_err(|e| Error::io(path, "create", e))
}

/// Writes a file so that it is there whole or not at all, also after a crash. A link at `path` is replaced, not followed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |mut file| file.write_all(bytes).map_err(|e| Error::io(path, "write", e)))
}

/// [`write_atomic`] of a file that is written in pieces.
pub fn write_atomic_with(path: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let temporary = temporary_path(path);
    let file = create_anew(&temporary)?;
    write(&file)?;
    publish(&file, &temporary, path)
}

/// Syncs a written file, gives it its final name and syncs the directory.
pub(crate) fn publish(file: &File, temporary: &Path, path: &Path) -> Result<()> {
    file.sync_all().map_err(|e| Error::io(path, "sync", e))?;
    std::fs::rename(temporary, path).map_err(|e| Error::io(path, "rename", e))?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(parent, "sync", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, path) = (dir.path().join("victim"), dir.path().join("config.json"));
        std::fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink("victim", &path).unwrap();
        std::os::unix::fs::symlink("victim", temporary_path(&path)).unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert!(!path.symlink_metadata().unwrap().is_symlink());
    }

    #[test]
    fn the_longest_name_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n".repeat(255));
        write_atomic(&path, b"x").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(is_temporary_name(temporary_path(&path).file_name().unwrap().to_str().unwrap()));
        assert!(!is_temporary_name("notes.tmp") && !is_temporary_name(".llmpress-mine.tmp"));
    }
}
