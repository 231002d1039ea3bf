//! A component: one stored tensor, as the decoders see it.
//!
//! ```text
//! file: | header | ... | start .. start + bytes: this component | ... |
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::header::TensorInfo;
use crate::{Dtype, Error, Mapped, Result};

/// An open file and its name.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
}

/// A byte range of an open file that holds one stored tensor. Cheap to clone.
///
/// Reads are positioned (`pread`): they share no cursor, never map memory, and report a file that
/// was cut short as an error.
#[derive(Debug, Clone)]
pub struct Component {
    pub(crate) file: Arc<OpenFile>,
    /// Shared with the header it was read from: there may be a million of them.
    pub(crate) info: Arc<TensorInfo>,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

impl Component {
    /// The stored tensor's name in its file.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// The file that holds it.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Its dtype.
    pub fn dtype(&self) -> Dtype {
        self.info.dtype
    }

    /// Its shape.
    pub fn shape(&self) -> &[u64] {
        &self.info.shape
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it starts in its file.
    pub fn file_offset(&self) -> u64 {
        self.start
    }

    /// Fills `buf` from `offset` bytes into the component.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.bytes()) {
            return Err(self.corrupt(format!(
                "needs bytes {offset} to {} of a component of {} bytes",
                offset.saturating_add(buf.len() as u64),
                self.bytes()
            )));
        }
        self.file.file.read_exact_at(buf, self.start + offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                self.corrupt("the file was cut short while it was being read".to_owned())
            }
            _ => Error::io(&self.file.path, "read", e),
        })
    }

    /// Its bytes in memory without a copy, mapped for this owner alone.
    ///
    /// # Errors
    /// A file that was cut short, or that cannot be mapped; a component without bytes.
    pub fn map(&self) -> Result<Mapped> {
        Mapped::new(&self.file, self.start, self.bytes)
    }

    /// The whole component, refused as corrupt when larger than `limit` bytes.
    pub(crate) fn read_all(&self, limit: u64) -> Result<Vec<u8>> {
        if self.bytes() > limit {
            return Err(
                self.corrupt(format!("has {} bytes where at most {limit} are possible", self.bytes()))
            );
        }
        let mut buf = vec![0; self.bytes() as usize];
        self.read_at(0, &mut buf)?;
        Ok(buf)
    }

    /// Refuses another dtype or size than the encoding needs.
    pub(crate) fn require(&self, dtype: Dtype, bytes: u64) -> Result<()> {
        if self.dtype() != dtype || self.bytes() != bytes {
            return Err(self.corrupt(format!(
                "is {} of {} bytes; its encoding needs {} of {bytes} bytes",
                self.dtype().name(),
                self.bytes(),
                dtype.name(),
            )));
        }
        Ok(())
    }

    pub(crate) fn corrupt(&self, what: String) -> Error {
        Error::corrupt(&self.file.path, Some(self.name()), what)
    }
}
