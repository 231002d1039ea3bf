//! Small whole files: bounded reads, atomic writes.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Reads a file of at most `limit` bytes.
pub fn read_small_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, "read", e))?;
    if bytes.len() as u64 > limit {
        return Err(Error::corrupt(
            path,
            None,
            format!("is larger than {limit} bytes, the most that is read"),
        ));
    }
    Ok(bytes)
}

/// The name under which `path` is written before it is complete.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Writes a file so that it is there whole or not at all, also after a crash.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_path(path);
    let mut file = File::create(&temporary).map_err(|e| Error::io(&temporary, "create", e))?;
    file.write_all(bytes).map_err(|e| Error::io(&temporary, "write", e))?;
    publish(&file, &temporary, path)
}

/// Syncs a written file, gives it its final name and syncs the directory.
pub(crate) fn publish(file: &File, temporary: &Path, path: &Path) -> Result<()> {
    file.sync_all().map_err(|e| Error::io(temporary, "sync", e))?;
    std::fs::rename(temporary, path).map_err(|e| Error::io(path, "rename", e))?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(parent, "sync", e))
}
