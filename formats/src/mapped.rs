//! A stored tensor in memory without a copy.

use std::ops::Deref;

use memmap2::{MmapMut, MmapOptions};

use crate::component::OpenFile;
use crate::{Error, Result};

/// The bytes of a component where they lie in the file, mapped for this owner alone: what is written to them stays in this process and never
/// reaches the file. `Send + Sync`.
///
/// Nobody may shorten the file while it lives: the system would end the process when it reads what is gone.
#[derive(Debug)]
pub struct Mapped(MmapMut);

impl Mapped {
    pub(crate) fn new(file: &OpenFile, start: u64, bytes: u64) -> Result<Self> {
        let now = file.file.metadata().map_err(|e| Error::io(&file.path, "examine", e))?.len();
        let length = usize::try_from(bytes).ok().filter(|_| start.saturating_add(bytes) <= now);
        let length =
            length.ok_or_else(|| Error::corrupt(&file.path, None, "the file was cut short meanwhile"))?;
        #[allow(unsafe_code)]
        // SAFETY: the mapping is private; that nobody shortens the file meanwhile is the documented duty of the caller.
        let map = unsafe { MmapOptions::new().offset(start).len(length).map_copy(&file.file) };
        Ok(Self(map.map_err(|e| Error::io(&file.path, "map", e))?))
    }

    /// Where the bytes begin, for whoever passes them on to another language.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
