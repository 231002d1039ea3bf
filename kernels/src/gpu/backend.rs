//! What a device must do, and how a kernel is started.

use std::fmt::Debug;

use super::Result;

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// An address in device memory: `T*`.
    Pointer(u64),
    /// `u32`.
    U32(u32),
    /// `u64`.
    U64(u64),
    /// `float`.
    F32(f32),
}

impl Argument {
    /// Its bytes, in the first of which it starts.
    #[must_use]
    pub fn slot(self) -> u64 {
        match self {
            Self::Pointer(x) | Self::U64(x) => x,
            Self::U32(x) => u64::from(x),
            Self::F32(x) => u64::from(x.to_bits()),
        }
    }
}

/// A kernel with its grid and arguments.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The source it stands in, without `.cu`.
    pub file: &'static str,
    /// Its name.
    pub kernel: &'static str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Its arguments, as many and of such types as it takes.
    pub arguments: &'a [Argument],
    /// Whether it may begin before what was started earlier has ended, where the device can do that: true unless that makes
    /// its weights, the only thing that kernels read before they wait.
    pub overlaps: bool,
}

/// A device: memory, and kernels that run in the order in which they are started.
///
/// Addresses are numbers; only this device may follow them.
pub trait Backend: Debug + Send + Sync {
    /// So many bytes, aligned to 256.
    ///
    /// # Errors
    /// Not so much memory.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back that [`Self::allocate`] gave out.
    fn free(&self, address: u64);

    /// Copies to the device, after all that was started before.
    ///
    /// # Errors
    /// The range is not inside a buffer; the driver's own.
    fn write(&self, address: u64, data: &[u8]) -> Result<()>;

    /// Copies from the device, after all that was started before, and waits.
    ///
    /// # Errors
    /// The range is not inside a buffer; a kernel before it failed.
    fn read(&self, address: u64, data: &mut [u8]) -> Result<()>;

    /// Copies within the device. The ranges may not overlap.
    ///
    /// # Errors
    /// A range is not inside a buffer.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;

    /// Starts a kernel.
    ///
    /// # Errors
    /// No such kernel; a launch that the device refuses; in the emulator, a fault of the kernel.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Waits for everything that was started.
    ///
    /// # Errors
    /// A kernel failed.
    fn synchronize(&self) -> Result<()>;

    /// Multiprocessors, by which launchers size their grids.
    fn multiprocessors(&self) -> u32;

    /// Bytes of shared memory that a block may have.
    fn shared_limit(&self) -> u32;

    /// Whether `mma` adds in the order that the kernels state. A GPU's rounds sums in a way of its own.
    fn adds_in_order(&self) -> bool;

    /// Bytes of memory that are free, and all there are.
    ///
    /// # Errors
    /// The driver's own.
    fn memory(&self) -> Result<(usize, usize)>;

    /// From here on launches and copies are recorded, not run.
    ///
    /// # Errors
    /// It records already.
    fn begin_capture(&self) -> Result<()>;

    /// Ends the recording.
    ///
    /// # Errors
    /// It does not record; what was recorded cannot be replayed.
    fn end_capture(&self) -> Result<Box<dyn Graph>>;

    /// Seconds that the device takes for what `work` starts.
    ///
    /// # Errors
    /// Those of `work`; a kernel failed.
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
}

/// Recorded launches and copies: [`Backend::begin_capture`].
pub trait Graph: Debug + Send {
    /// Starts all of it again, with the same arguments.
    ///
    /// # Errors
    /// Those of the launches.
    fn replay(&mut self) -> Result<()>;
}
