//! Memory of a device.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytemuck::{AnyBitPattern, NoUninit};

use super::backend::Argument;
use super::{Backend, Error, Result};

/// Memory of a device, given back when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    backend: Arc<dyn Backend>,
    tally: Arc<Tally>,
    address: u64,
    bytes: usize,
}

/// Bytes in buffers, and the most there were.
#[derive(Debug, Default)]
pub(super) struct Tally {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl Tally {
    pub(super) fn read(&self) -> (usize, usize) {
        (self.now.load(Relaxed), self.peak.load(Relaxed))
    }
}

impl Buffer {
    pub(super) fn new(backend: Arc<dyn Backend>, tally: Arc<Tally>, bytes: usize) -> Result<Self> {
        // An empty buffer has an address too.
        let address = backend.allocate(bytes.max(1))?;
        let now = tally.now.fetch_add(bytes, Relaxed) + bytes;
        tally.peak.fetch_max(now, Relaxed);
        Ok(Self { backend, tally, address, bytes })
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of it.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        View { buffer: self, start: 0, bytes: self.bytes }
    }

    /// Some bytes of it.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Result<View<'_>> {
        self.view().slice(range)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.backend.free(self.address);
        self.tally.now.fetch_sub(self.bytes, Relaxed);
    }
}

/// Some bytes of a [`Buffer`].
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    buffer: &'a Buffer,
    start: usize,
    bytes: usize,
}

impl<'a> View<'a> {
    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Some bytes of it.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Result<View<'a>> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Error::Invalid(format!(
                "bytes {} to {} of a buffer of {}",
                range.start, range.end, self.bytes
            )));
        }
        Ok(Self { buffer: self.buffer, start: self.start + range.start, bytes: range.len() })
    }

    /// Where it starts, for a kernel.
    #[must_use]
    pub fn pointer(&self) -> Argument {
        Argument::Pointer(self.buffer.address + self.start as u64)
    }

    /// Refuses a view that is smaller than a kernel is going to read or write.
    ///
    /// # Errors
    /// It is; `what` names it.
    pub fn require(&self, what: &str, bytes: usize) -> Result<()> {
        if self.bytes < bytes {
            return Err(Error::Invalid(format!("{what} has {} bytes; the kernel needs {bytes}", self.bytes)));
        }
        Ok(())
    }

    /// Refuses an address that vectors or numbers of `bytes` bytes cannot start at.
    ///
    /// # Errors
    /// It does not start at a multiple of `bytes`; `what` names it.
    pub fn require_aligned(&self, what: &str, bytes: u64) -> Result<()> {
        if !self.pointer().slot().is_multiple_of(bytes) {
            return Err(Error::Invalid(format!("{what} does not start at a multiple of {bytes} bytes")));
        }
        Ok(())
    }

    /// Copies elements to its start.
    ///
    /// # Errors
    /// They do not fit; the driver's own.
    pub fn write<T: NoUninit>(&self, data: &[T]) -> Result<()> {
        let data: &[u8] = bytemuck::cast_slice(data);
        self.require("the buffer written to", data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        self.buffer.backend.write(self.buffer.address + self.start as u64, data)
    }

    /// Copies elements from its start, after all that was started before.
    ///
    /// # Errors
    /// There are not so many; a kernel before it failed.
    pub fn read<T: AnyBitPattern + NoUninit>(&self, count: usize) -> Result<Vec<T>> {
        let mut data = vec![T::zeroed(); count];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut data);
        self.require("the buffer read from", bytes.len())?;
        if !bytes.is_empty() {
            self.buffer.backend.read(self.buffer.address + self.start as u64, bytes)?;
        }
        Ok(data)
    }

    /// Copies all of it to the start of another view of the same device.
    ///
    /// # Errors
    /// It does not fit.
    pub fn copy_to(&self, to: View<'_>) -> Result<()> {
        to.require("the buffer copied to", self.bytes)?;
        if self.bytes == 0 {
            return Ok(());
        }
        let address = |view: &View<'_>| view.buffer.address + view.start as u64;
        self.buffer.backend.copy(address(self), address(&to), self.bytes)
    }
}
