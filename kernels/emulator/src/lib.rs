//! A device that runs the CUDA sources on the processor, for tests.
//!
//! ```text
//! kernels/cuda/*.cu --> the host's C++ compiler, every access marked --> block by block, thread by thread
//! ```
//!
//! A kernel that reads or writes outside of its buffers, reads what nobody wrote, races with another thread, leaves a
//! thread behind at a barrier, or touches what earlier launches write before it waits for them, ends in
//! [`Error::Fault`]. `mma` adds in the order of k with fused multiply-adds.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use llmpress_kernels::gpu::{Argument, Backend, Error, Graph, Launch, Result};

/// Most threads of a block.
const MAX_THREADS: u32 = 1024;
/// Most shared memory of a block: an H100's.
const MAX_SHARED: u32 = 227 << 10;
/// What a launch or a copy takes by the device's clock beside its accesses.
const LAUNCH_NANOSECONDS: u64 = 1000;

#[allow(unsafe_code)]
mod native {
    use super::{c_char, c_int, c_void};

    // SAFETY: emulator.cpp defines these functions with these types.
    unsafe extern "C" {
        pub(super) fn llmpress_emulator_new() -> *mut c_void;
        pub(super) fn llmpress_emulator_delete(device: *mut c_void);
        pub(super) fn llmpress_emulator_allocate(device: *mut c_void, bytes: usize) -> u64;
        pub(super) fn llmpress_emulator_free(device: *mut c_void, address: u64);
        pub(super) fn llmpress_emulator_settle(device: *mut c_void);
        pub(super) fn llmpress_emulator_inside(device: *mut c_void, address: u64, bytes: usize) -> c_int;
        pub(super) fn llmpress_emulator_write(address: u64, data: *const u8, bytes: usize);
        pub(super) fn llmpress_emulator_read(address: u64, data: *mut u8, bytes: usize);
        pub(super) fn llmpress_emulator_kernel(
            file: *const c_char,
            name: *const c_char,
            kinds: *mut *const u8,
        ) -> c_int;
        pub(super) fn llmpress_emulator_launch(
            device: *mut c_void,
            file: *const c_char,
            name: *const c_char,
            grid: *const u32,
            threads: u32,
            shared: u32,
            backwards: c_int,
            overlaps: c_int,
            arguments: *const u64,
            accesses: *mut u64,
            reason: *mut *const c_char,
        ) -> c_int;
    }
}

/// What a kernel takes as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// `T*`.
    Pointer,
    /// `u32`.
    U32,
    /// `u64`.
    U64,
    /// `float`.
    F32,
}

impl Parameter {
    /// In the order of `Kind` of registry.h.
    const ALL: [Self; 4] = [Self::Pointer, Self::U32, Self::U64, Self::F32];

    fn of(argument: &Argument) -> Self {
        match argument {
            Argument::Pointer(_) => Self::Pointer,
            Argument::U32(_) => Self::U32,
            Argument::U64(_) => Self::U64,
            Argument::F32(_) => Self::F32,
        }
    }

    /// Its size.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Pointer | Self::U64 => 8,
            Self::U32 | Self::F32 => 4,
        }
    }

    /// The argument whose bytes these are: the inverse of [`Argument::slot`].
    #[must_use]
    pub fn argument(self, slot: u64) -> Argument {
        match self {
            Self::Pointer => Argument::Pointer(slot),
            Self::U32 => Argument::U32(slot as u32),
            Self::U64 => Argument::U64(slot),
            Self::F32 => Argument::F32(f32::from_bits(slot as u32)),
        }
    }
}

/// What a kernel of a source takes; none where there is no such kernel.
#[must_use]
#[allow(unsafe_code)]
pub fn parameters(file: &str, kernel: &str) -> Option<Vec<Parameter>> {
    let (file, name) = (CString::new(file).ok()?, CString::new(kernel).ok()?);
    let mut kinds = std::ptr::null();
    // SAFETY: both names end in a zero byte.
    let count = unsafe { native::llmpress_emulator_kernel(file.as_ptr(), name.as_ptr(), &mut kinds) };
    let count = usize::try_from(count).ok()?;
    // SAFETY: a static table of so many bytes.
    let kinds = unsafe { std::slice::from_raw_parts(kinds, count) };
    kinds.iter().map(|kind| Parameter::ALL.get(usize::from(*kind)).copied()).collect()
}

/// The emulated device.
#[derive(Debug)]
pub struct Emulator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    device: Mutex<Device>,
    backwards: bool,
    shared_limit: u32,
}

#[derive(Debug)]
struct Device {
    native: *mut c_void,
    /// What it has worked: a time that is the same on every processor, however busy.
    nanoseconds: u64,
    /// What was started since a recording began.
    recorded: Option<Vec<Step>>,
}

/// A recorded step.
#[derive(Clone, Debug)]
enum Step {
    Launch {
        file: &'static str,
        kernel: &'static str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        arguments: Vec<Argument>,
        overlaps: bool,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
}

// SAFETY: the device is reached through a mutex only, and keeps nothing of the thread it was used on.
#[allow(unsafe_code)]
unsafe impl Send for Device {}

impl Default for Emulator {
    fn default() -> Self {
        Self::new()
    }
}

impl Emulator {
    /// A device without buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::of(false, MAX_SHARED)
    }

    /// One whose blocks have at most so many bytes of shared memory.
    ///
    /// # Panics
    /// More than 227 KiB.
    #[must_use]
    pub fn with_shared_limit(bytes: u32) -> Self {
        assert!(bytes <= MAX_SHARED);
        Self::of(false, bytes)
    }

    /// One that runs the blocks of a grid from the last to the first. A kernel whose blocks read what others
    /// overwrite is caught in one of the two orders.
    #[must_use]
    pub fn backwards() -> Self {
        Self::of(true, MAX_SHARED)
    }

    /// How long the device has worked, by a clock that counts its accesses to memory: a nanosecond each, and a thousand for a
    /// launch or a copy. The same work takes the same time in every run.
    #[must_use]
    pub fn clock(&self) -> Duration {
        Duration::from_nanos(self.0.device().nanoseconds)
    }

    #[allow(unsafe_code)]
    fn of(backwards: bool, shared_limit: u32) -> Self {
        // SAFETY: takes nothing; deleted in `drop`.
        let native = unsafe { native::llmpress_emulator_new() };
        Self(Arc::new(Inner {
            device: Mutex::new(Device { native, nanoseconds: 0, recorded: None }),
            backwards,
            shared_limit,
        }))
    }
}

impl Device {
    /// A copy of so many bytes takes what a launch takes that reads and writes them 16 at a time.
    fn moved(&mut self, bytes: usize) {
        self.nanoseconds += LAUNCH_NANOSECONDS + (bytes as u64).div_ceil(8);
    }

    #[allow(unsafe_code)]
    fn inside(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: looks the numbers up in a list.
        if unsafe { native::llmpress_emulator_inside(self.native, address, bytes) } == 0 {
            return Err(Error::Invalid(format!("{bytes} bytes at {address:#x} are not in one buffer")));
        }
        Ok(())
    }

    fn not_recording(&self, what: &str) -> Result<()> {
        match self.recorded {
            Some(_) => Err(Error::Invalid(format!("{what} while launches are recorded"))),
            None => Ok(()),
        }
    }

    /// Waits for all launches, as a copy does.
    #[allow(unsafe_code)]
    fn settle(&self) {
        // SAFETY: the device lives as long as `self`.
        unsafe { native::llmpress_emulator_settle(self.native) }
    }

    #[allow(unsafe_code)]
    fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.settle();
        self.moved(bytes);
        self.inside(from, bytes)?;
        self.inside(to, bytes)?;
        let mut data = vec![0; bytes];
        // SAFETY: the bytes lie in buffers of the device.
        unsafe {
            native::llmpress_emulator_read(from, data.as_mut_ptr(), bytes);
            native::llmpress_emulator_write(to, data.as_ptr(), bytes);
        }
        Ok(())
    }
}

impl Drop for Device {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `of`, and nobody else has it.
        unsafe { native::llmpress_emulator_delete(self.native) }
    }
}

impl Inner {
    fn device(&self) -> std::sync::MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[allow(unsafe_code)]
impl Inner {
    /// Runs a grid.
    fn run(&self, launch: &Launch<'_>) -> Result<()> {
        let kernel = format!("{}/{}", launch.file, launch.kernel);
        let invalid = |what: String| Err(Error::Invalid(format!("{kernel}: {what}")));
        let (Ok(file), Ok(name)) = (CString::new(launch.file), CString::new(launch.kernel)) else {
            return invalid("no such kernel".to_owned());
        };
        let Some(taken) = parameters(launch.file, launch.kernel) else {
            return invalid("no such kernel".to_owned());
        };
        let given: Vec<Parameter> = launch.arguments.iter().map(Parameter::of).collect();
        if given != taken {
            return invalid(format!("takes arguments {taken:?}, not {given:?}"));
        }
        if launch.block == 0 || launch.block > MAX_THREADS || launch.shared > self.shared_limit {
            return invalid(format!("a block of {} threads, {} bytes", launch.block, launch.shared));
        }
        if launch.grid.contains(&0) || launch.grid[1] > 65535 || launch.grid[2] > 65535 {
            return invalid(format!("a grid of {:?}", launch.grid));
        }
        let arguments: Vec<u64> = launch.arguments.iter().map(|a| a.slot()).collect();
        let (mut accesses, mut reason) = (0, std::ptr::null());
        let mut device = self.device();
        // SAFETY: the kernel exists, its arguments have the kinds that it takes, and the emulator checks what it does
        // with them; the device is locked.
        let fault = unsafe {
            native::llmpress_emulator_launch(
                device.native,
                file.as_ptr(),
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.block,
                launch.shared,
                c_int::from(self.backwards),
                c_int::from(launch.overlaps),
                arguments.as_ptr(),
                &mut accesses,
                &mut reason,
            )
        };
        device.nanoseconds += LAUNCH_NANOSECONDS + accesses;
        if fault == 0 {
            return Ok(());
        }
        // SAFETY: after a fault the reason is a text that ends in a zero byte, and the device is still locked.
        let fault = unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned();
        Err(Error::Fault { kernel, fault })
    }
}

/// Recorded launches.
#[derive(Debug)]
struct Recording {
    device: Arc<Inner>,
    steps: Vec<Step>,
}

impl Graph for Recording {
    fn replay(&mut self) -> Result<()> {
        for step in &self.steps {
            match step {
                Step::Copy { from, to, bytes } => self.device.device().copy(*from, *to, *bytes)?,
                Step::Launch { file, kernel, grid, block, shared, arguments, overlaps } => {
                    self.device.run(&Launch {
                        file,
                        kernel,
                        grid: *grid,
                        block: *block,
                        shared: *shared,
                        arguments,
                        overlaps: *overlaps,
                    })?
                }
            }
        }
        Ok(())
    }
}

#[allow(unsafe_code)]
impl Backend for Emulator {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.0.device().not_recording("an allocation")?;
        // SAFETY: the device lives as long as `self`.
        match unsafe { native::llmpress_emulator_allocate(self.0.device().native, bytes) } {
            0 => Err(Error::Memory { asked: bytes, free: 0, total: 0 }),
            address => Ok(address),
        }
    }

    fn free(&self, address: u64) {
        // SAFETY: the device looks the address up and ignores others'.
        unsafe { native::llmpress_emulator_free(self.0.device().native, address) }
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        let mut device = self.0.device();
        device.inside(address, data.len())?;
        device.not_recording("a copy to or from the device")?;
        device.settle();
        device.moved(data.len());
        // SAFETY: the bytes lie in a buffer of the device, which is locked.
        unsafe { native::llmpress_emulator_write(address, data.as_ptr(), data.len()) }
        Ok(())
    }

    fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        let mut device = self.0.device();
        device.inside(address, data.len())?;
        device.not_recording("a copy to or from the device")?;
        device.settle();
        device.moved(data.len());
        // SAFETY: the bytes lie in a buffer of the device, which is locked.
        unsafe { native::llmpress_emulator_read(address, data.as_mut_ptr(), data.len()) }
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let mut device = self.0.device();
        match &mut device.recorded {
            Some(recorded) => recorded.push(Step::Copy { from, to, bytes }),
            None => device.copy(from, to, bytes)?,
        }
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let mut device = self.0.device();
        if let Some(recorded) = &mut device.recorded {
            let Launch { file, kernel, grid, block, shared, arguments, overlaps } = *launch;
            let arguments = arguments.to_vec();
            recorded.push(Step::Launch { file, kernel, grid, block, shared, arguments, overlaps });
            return Ok(());
        }
        drop(device);
        self.0.run(launch)
    }

    fn synchronize(&self) -> Result<()> {
        self.0.device().settle();
        Ok(())
    }

    fn multiprocessors(&self) -> u32 {
        4
    }

    fn adds_in_order(&self) -> bool {
        true
    }

    fn shared_limit(&self) -> u32 {
        self.0.shared_limit
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok((usize::MAX, usize::MAX))
    }

    fn begin_capture(&self) -> Result<()> {
        let mut device = self.0.device();
        device.not_recording("a recording began")?;
        device.recorded = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        let steps = self.0.device().recorded.take();
        let steps = steps.ok_or_else(|| Error::Invalid("a recording ended that never began".to_owned()))?;
        Ok(Box::new(Recording { device: self.0.clone(), steps }))
    }

    /// By [`Emulator::clock`].
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = self.clock();
        work()?;
        Ok((self.clock() - start).as_secs_f64())
    }
}
