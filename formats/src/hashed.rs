//! Text that goes into a file as it is made, with its digest: what is never whole in memory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{Digest, Error, Result};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub bytes: u64,
    /// Their digest.
    pub digest: Digest,
}

/// Writes to a file from some place on and hashes what passes.
pub(crate) struct Hashed<'a> {
    file: &'a File,
    at: u64,
    bytes: u64,
    hasher: blake3::Hasher,
}

impl<'a> Hashed<'a> {
    pub(crate) fn new(file: &'a File, at: u64) -> Self {
        Self { file, at, bytes: 0, hasher: blake3::Hasher::new() }
    }

    pub(crate) fn finish(self) -> Written {
        Written { bytes: self.bytes, digest: self.hasher.finalize().into() }
    }
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write_all_at(bytes, self.at + self.bytes)?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Has JSON written into an open file from byte `at` on; `path` is for errors.
pub fn write_json(
    file: &File,
    path: &Path,
    at: u64,
    write: impl FnOnce(&mut dyn Write) -> serde_json::Result<()>,
) -> Result<Written> {
    let mut out = BufWriter::with_capacity(1 << 16, Hashed::new(file, at));
    write(&mut out).map_err(|e| match e.io_error_kind() {
        Some(kind) => Error::io(path, "write", kind.into()),
        None => Error::Invalid(format!("{}: {e}", path.display())),
    })?;
    let hashed = out.into_inner().map_err(|e| Error::io(path, "write", e.into_error()))?;
    Ok(hashed.finish())
}
