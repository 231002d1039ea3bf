//! The CUDA driver as a backend.
//!
//! ```text
//! libcuda, found when it is asked for --> context, one stream --> modules from PTX, each loaded when first used
//! ```

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result as driver;
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};
use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::backend::Graph;
use super::{Backend, Error, Launch, Result, ptx, symbols};

/// The driver that understands the embedded PTX.
const MIN_DRIVER: (i32, i32) = (12, 4);
/// The first compute capability with everything that the kernels use.
const MIN_CAPABILITY: (i32, i32) = (8, 0);
/// Room for what the driver says of PTX that it does not compile.
const LOG_BYTES: usize = 16 << 10;
/// Shared memory that a block has without being asked for.
const PLAIN_SHARED: u32 = 48 << 10;

/// What is known of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory: usize,
    /// The CUDA version that the driver supports, major and minor.
    pub driver: (i32, i32),
}

/// One GPU through the CUDA driver.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    info: DeviceInfo,
    functions: Mutex<Functions>,
    shared_limit: u32,
    /// While launches are recorded: memory that is to be given back afterwards.
    recording: Mutex<Option<Vec<u64>>>,
}

#[derive(Default)]
struct Functions {
    /// By the address of the text.
    modules: HashMap<*const u8, Module>,
    kernels: HashMap<(&'static str, &'static str), Kernel>,
}

struct Module(sys::CUmodule);

impl Functions {
    fn module(&mut self, file: &str, module: ptx::Module) -> Result<sys::CUmodule> {
        let key = module.text.as_ptr();
        if let Some(module) = self.modules.get(&key) {
            return Ok(module.0);
        }
        let module = load(file, module.text)?;
        self.modules.insert(key, Module(module));
        Ok(module)
    }
}

#[derive(Clone, Copy)]
struct Kernel {
    function: sys::CUfunction,
    shared: u32,
    /// Whether it waits by itself for what was started before.
    overlaps: bool,
}

// SAFETY: handles of the driver may be used from any thread that has the context, which every call here binds.
#[allow(unsafe_code)]
unsafe impl Send for Functions {}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("info", &self.info).finish_non_exhaustive()
    }
}

fn failed(call: &str) -> impl FnOnce(DriverError) -> Error + '_ {
    move |e| Error::Driver { call: call.to_owned(), reason: format!("{e:?}") }
}

/// The functions of the driver's library without which no GPU is opened.
pub fn functions() -> impl Iterator<Item = &'static str> {
    symbols::TO_ASK.iter().chain(symbols::TO_RUN).copied()
}

/// The GPUs that the driver knows.
///
/// # Errors
/// [`Error::Unavailable`] without a driver or a GPU.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    let unavailable = |why: String| Error::Unavailable(why);
    // SAFETY: loads the driver's library and unloads it.
    #[allow(unsafe_code)]
    let present = unsafe { sys::is_culib_present() };
    if !present {
        return Err(unavailable(
            "no CUDA driver was found (libcuda.so.1): --device cuda needs an NVIDIA GPU and its driver"
                .to_owned(),
        ));
    }
    symbols::check(symbols::TO_ASK)?;
    driver::init().map_err(|e| unavailable(format!("the CUDA driver does not start: {e:?}")))?;
    let mut version = 0;
    // SAFETY: writes one integer.
    #[allow(unsafe_code)]
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    let driver_version = (version / 1000, version % 1000 / 10);
    let count = driver::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    if count == 0 {
        return Err(unavailable("the CUDA driver is there, but it finds no GPU".to_owned()));
    }
    (0..count)
        .map(|ordinal| {
            let device = driver::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
            let attribute = |which| {
                // SAFETY: the driver gave the device.
                #[allow(unsafe_code)]
                unsafe { driver::device::get_attribute(device, which) }
                    .map_err(failed("cuDeviceGetAttribute"))
            };
            // SAFETY: the driver gave the device.
            #[allow(unsafe_code)]
            let memory = unsafe { driver::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?;
            Ok(DeviceInfo {
                ordinal: ordinal as usize,
                name: driver::device::get_name(device).map_err(failed("cuDeviceGetName"))?,
                capability: (
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ),
                multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
                memory,
                driver: driver_version,
            })
        })
        .collect()
}

impl DeviceInfo {
    /// Whether the kernels run here.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: why not.
    pub fn check(&self) -> Result<()> {
        if self.driver < MIN_DRIVER {
            return Err(Error::Unavailable(format!(
                "the NVIDIA driver supports CUDA {}.{}; the kernels need {}.{} (driver 550 or newer)",
                self.driver.0, self.driver.1, MIN_DRIVER.0, MIN_DRIVER.1
            )));
        }
        if self.capability < MIN_CAPABILITY {
            return Err(Error::Unavailable(format!(
                "{} has compute capability {}.{}; the kernels need {}.{} (Ampere) or newer",
                self.name, self.capability.0, self.capability.1, MIN_CAPABILITY.0, MIN_CAPABILITY.1
            )));
        }
        Ok(())
    }
}

impl Cuda {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, such a GPU, or one that is new enough; says what is missing.
    pub fn open(ordinal: usize) -> Result<Self> {
        let devices = devices()?;
        let count = devices.len();
        let info = devices.into_iter().nth(ordinal).ok_or_else(|| {
            Error::Unavailable(format!("there is no GPU {ordinal}: the driver finds {count}, from 0 on"))
        })?;
        info.check()?;
        symbols::check(symbols::TO_RUN)?;
        let context = CudaContext::new(ordinal).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let stream = context.new_stream().map_err(failed("cuStreamCreate"))?;
        let shared_limit = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .map_err(failed("cuDeviceGetAttribute"))? as u32;
        Ok(Self {
            context,
            stream,
            info,
            functions: Mutex::default(),
            shared_limit,
            recording: Mutex::default(),
        })
    }

    /// What is known of it.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The stream that everything runs on, for libraries that are measured beside the kernels.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Has the driver compile a source's PTX, unless it did.
    ///
    /// # Errors
    /// There is no such source; the driver refuses it.
    pub fn load(&self, file: &'static str) -> Result<()> {
        self.bind()?;
        let modules = ptx::modules_of(file, self.info.capability);
        if modules.is_empty() {
            return Err(Error::Invalid(format!("there is no PTX of {file}.cu")));
        }
        let mut functions = self.functions();
        modules.into_iter().try_for_each(|module| functions.module(file, module).map(|_| ()))
    }

    /// Makes its context the calling thread's.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }

    fn recording(&self) -> MutexGuard<'_, Option<Vec<u64>>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn functions(&self) -> MutexGuard<'_, Functions> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kernel with room for so much shared memory.
    #[allow(unsafe_code)]
    fn kernel(&self, file: &'static str, name: &'static str, shared: u32) -> Result<Kernel> {
        if shared > self.shared_limit {
            return Err(Error::Unsupported(format!(
                "{file}/{name} needs {shared} bytes of shared memory; {} has {}",
                self.info.name, self.shared_limit
            )));
        }
        let mut functions = self.functions();
        if !functions.kernels.contains_key(&(file, name)) {
            let modules = ptx::modules_of(file, self.info.capability);
            let text = modules
                .into_iter()
                .find(|module| module.has(name))
                .ok_or_else(|| Error::Invalid(format!("there is no kernel {file}/{name}")))?;
            let module = functions.module(file, text)?;
            let symbol =
                CString::new(name).map_err(|_| Error::Invalid(format!("{name:?} is not a kernel's name")))?;
            // SAFETY: the module is loaded and stays so.
            let function = unsafe { driver::module::get_function(module, symbol) }
                .map_err(failed(&format!("cuModuleGetFunction({file}/{name})")))?;
            let kernel = Kernel { function, shared: PLAIN_SHARED, overlaps: text.overlaps };
            functions.kernels.insert((file, name), kernel);
        }
        let Some(kernel) = functions.kernels.get_mut(&(file, name)) else {
            return Err(Error::Invalid(format!("there is no kernel {file}/{name}")));
        };
        if shared > kernel.shared {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function's module is loaded.
            unsafe { driver::function::set_function_attribute(kernel.function, attribute, shared as i32) }
                .map_err(failed("cuFuncSetAttribute"))?;
            kernel.shared = shared;
        }
        Ok(*kernel)
    }
}

#[allow(unsafe_code)]
fn load(file: &str, text: &str) -> Result<sys::CUmodule> {
    let text = CString::new(text).map_err(|_| Error::Invalid(format!("the PTX of {file}.cu is damaged")))?;
    let mut log = vec![0u8; LOG_BYTES];
    // What an option takes is passed in place of a pointer, except for the buffer.
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = std::ptr::null_mut();
    // SAFETY: a text that ends in a zero byte, which is what the driver expects of PTX; two options with their values, of which
    // the buffer has the size that is said.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            text.as_ptr().cast::<c_void>(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    loaded.result().map_err(|e| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        let said = String::from_utf8_lossy(&log[..end]);
        let said = said.trim();
        let colon = if said.is_empty() { "" } else { ": " };
        Error::Driver { call: format!("cuModuleLoadDataEx({file})"), reason: format!("{e:?}{colon}{said}") }
    })?;
    Ok(module)
}

impl Drop for Cuda {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let _ = self.bind();
        let _ = self.stream.synchronize();
        for (_, module) in self.functions().modules.drain() {
            // SAFETY: loaded in `load`, and no kernel of it runs any more.
            let _ = unsafe { driver::module::unload(module.0) };
        }
    }
}

#[allow(unsafe_code)]
impl Backend for Cuda {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: the context is bound; the memory is given back in `free`.
        unsafe { driver::malloc_sync(bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = self.memory().unwrap_or((0, self.info.memory));
                Error::Memory { asked: bytes, free, total }
            }
            _ => failed("cuMemAlloc")(e),
        })
    }

    fn free(&self, address: u64) {
        // Waiting would break a recording off.
        if let Some(later) = self.recording().as_mut() {
            later.push(address);
            return;
        }
        // Kernels that still use it run to their end first.
        if self.bind().is_ok() && self.stream.synchronize().is_ok() {
            // SAFETY: `allocate` gave it out, and a buffer gives it back once.
            let _ = unsafe { driver::free_sync(address) };
        }
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: a view checked that the bytes are inside its buffer; the copy is waited for.
        unsafe { driver::memcpy_htod_async(address, data, stream) }.map_err(failed("cuMemcpyHtoD"))?;
        self.synchronize()
    }

    fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: a view checked that the bytes are inside its buffer; the copy is waited for.
        unsafe { driver::memcpy_dtoh_async(data, address, stream) }.map_err(failed("cuMemcpyDtoH"))?;
        self.synchronize()
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: views checked that both ranges are inside their buffers.
        unsafe { driver::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .map_err(failed("cuMemcpyDtoD"))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.bind()?;
        let kernel = self.kernel(launch.file, launch.kernel, launch.shared)?;
        let mut slots: Vec<u64> = launch.arguments.iter().map(|a| a.slot()).collect();
        let mut pointers: Vec<*mut c_void> =
            slots.iter_mut().map(|slot| std::ptr::from_mut(slot).cast::<c_void>()).collect();
        let [x, y, z] = launch.grid;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream.cu_stream(),
            attrs: &mut overlap,
            numAttrs: u32::from(kernel.overlaps && launch.overlaps),
        };
        // SAFETY: the launcher passes what the kernel takes, which the emulator's tests check by kind; the driver
        // copies the configuration and the arguments before it returns.
        unsafe {
            sys::cuLaunchKernelEx(&config, kernel.function, pointers.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(|e| Error::Driver {
            call: format!(
                "the launch of {}/{} on {:?} blocks of {}",
                launch.file, launch.kernel, launch.grid, launch.block
            ),
            reason: format!("{e:?}"),
        })
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.stream.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    fn multiprocessors(&self) -> u32 {
        self.info.multiprocessors
    }

    fn shared_limit(&self) -> u32 {
        self.shared_limit
    }

    fn adds_in_order(&self) -> bool {
        false
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        driver::mem_get_info().map_err(failed("cuMemGetInfo"))
    }

    fn begin_capture(&self) -> Result<()> {
        self.bind()?;
        self.stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .map_err(failed("cuStreamBeginCapture"))?;
        *self.recording() = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: the stream is ours and capturing.
        let graph = unsafe { driver::stream::end_capture(stream) }.map_err(failed("cuStreamEndCapture"));
        let freed = self.recording().take().unwrap_or_default();
        for address in &freed {
            self.free(*address);
        }
        let graph = graph?;
        if !freed.is_empty() {
            // SAFETY: the driver gave the graph.
            let _ = unsafe { driver::graph::destroy(graph) };
            return Err(Error::Invalid(
                "memory was given back while launches that may use it were recorded".to_owned(),
            ));
        }
        let mut executable = std::ptr::null_mut();
        // SAFETY: the driver gave the graph; the executable is destroyed in `drop`.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) }.result();
        // SAFETY: the executable does not need the graph it was made from.
        let _ = unsafe { driver::graph::destroy(graph) };
        made.map_err(failed("cuGraphInstantiate"))?;
        Ok(Box::new(CudaGraph { executable, context: self.context.clone(), stream: self.stream.clone() }))
    }

    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.bind()?;
        let event = || {
            self.context
                .new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
                .map_err(failed("cuEventCreate"))
        };
        let (start, end) = (event()?, event()?);
        start.record(&self.stream).map_err(failed("cuEventRecord"))?;
        work()?;
        end.record(&self.stream).map_err(failed("cuEventRecord"))?;
        end.synchronize().map_err(failed("cuEventSynchronize"))?;
        Ok(f64::from(start.elapsed_ms(&end).map_err(failed("cuEventElapsedTime"))?) / 1e3)
    }
}

struct CudaGraph {
    executable: sys::CUgraphExec,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

// SAFETY: the driver lets any thread with the context launch a graph; `&self` launches are put in order by the stream.
#[allow(unsafe_code)]
unsafe impl Send for CudaGraph {}

impl std::fmt::Debug for CudaGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaGraph").finish_non_exhaustive()
    }
}

impl Graph for CudaGraph {
    #[allow(unsafe_code)]
    fn replay(&mut self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: instantiated in `end_capture`; the stream is the one it was captured on.
        unsafe { driver::graph::launch(self.executable, self.stream.cu_stream()) }
            .map_err(failed("cuGraphLaunch"))
    }
}

impl Drop for CudaGraph {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        let _ = self.stream.synchronize();
        // SAFETY: instantiated in `end_capture`, and not running any more.
        let _ = unsafe { driver::graph::exec_destroy(self.executable) };
    }
}
