//! Kernels for a GPU: the CUDA sources in `kernels/cuda`, and what starts them.
//!
//! ```text
//! launcher (one a kernel: shapes checked, grid chosen) --> Gpu --> Backend: the CUDA driver
//!                                                                          the emulator, in tests
//! ```

pub mod abq;
pub mod attention;
mod backend;
pub mod block_sums;
mod buffer;
pub mod cache_codes;
pub mod ceiling;
pub mod cublas;
pub mod cuda;
pub mod dense;
pub mod dfloat11;
pub mod embedding;
mod error;
pub mod experts;
pub mod fixed12;
pub mod gate;
pub mod layer_norm;
pub mod picker;
pub mod product;
pub mod proof;
mod ptx;
pub mod reference;
pub mod rms_norm;
pub mod rope;
pub mod sampling;
pub mod sparse24;
mod symbols;

pub use backend::{Argument, Backend, Graph, Launch};
pub use buffer::{Buffer, View};
pub use error::{Error, Result};
pub use ptx::modules;

use std::sync::Arc;

use bytemuck::NoUninit;

use buffer::Tally;

/// A device that holds buffers and runs kernels, in order.
#[derive(Clone, Debug)]
pub struct Gpu(Arc<dyn Backend>, Arc<Tally>);

impl Gpu {
    /// A device behind a backend.
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self(Arc::new(backend), Arc::default())
    }

    /// A buffer of so many bytes, aligned to 256. What it holds at first is undefined.
    ///
    /// # Errors
    /// Not so much memory.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        Buffer::new(self.0.clone(), self.1.clone(), bytes)
    }

    /// A buffer with these elements.
    ///
    /// # Errors
    /// Not so much memory; the driver's own.
    pub fn upload<T: NoUninit>(&self, data: &[T]) -> Result<Buffer> {
        let buffer = self.allocate(size_of_val(data))?;
        buffer.view().write(data)?;
        Ok(buffer)
    }

    /// Starts a kernel. It runs after everything that was started before it.
    ///
    /// # Errors
    /// No such kernel; a launch that the device refuses.
    pub fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.0.launch(launch)
    }

    /// Waits for everything that was started.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }

    /// Records what `work` starts, without running it.
    ///
    /// # Errors
    /// Those of `work`; reading, writing and allocating while it is recorded.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Box<dyn Graph>> {
        self.0.begin_capture()?;
        let done = work();
        // The recording must end, whatever became of the work.
        let graph = self.0.end_capture();
        done?;
        Ok(Box::new(Recording { graph: graph?, _backend: self.0.clone() }))
    }

    /// Bytes in buffers now, and the most there were.
    #[must_use]
    pub fn allocated(&self) -> (usize, usize) {
        self.1.read()
    }

    /// The backend.
    #[must_use]
    pub fn backend(&self) -> &dyn Backend {
        &*self.0
    }
}

/// A recording, and the device whose kernels it starts: they stay loaded as long as it may be replayed.
#[derive(Debug)]
struct Recording {
    graph: Box<dyn Graph>,
    _backend: Arc<dyn Backend>,
}

impl Graph for Recording {
    fn replay(&mut self) -> Result<()> {
        self.graph.replay()
    }
}

/// A size as kernels take it.
fn size32(what: &str, size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| Error::Unsupported(format!("{what}: {size} is beyond 32 bits")))
}
