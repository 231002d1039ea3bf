//! NVIDIA's own matrix product, to be measured beside ours. Loaded when it is asked for, if it is installed.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use cudarc::driver::CudaStream;
use libloading::Library;

use super::cuda::Cuda;
use super::{Argument, Buffer, Error, Gpu, Result, View};

/// Names of the library, the newest first: those of CUDA 13 to 11, and what a development package adds.
const NAMES: [&str; 4] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"];
/// What NVIDIA recommends for Hopper. Without a workspace of its own the library allocates, which a recording forbids.
const WORKSPACE_BYTES: usize = 32 << 20;

// Of cublas_api.h and library_types.h, the same in all releases.
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const ALGORITHM_DEFAULT: c_int = -1;

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type SetStream = unsafe extern "C" fn(Handle, *mut c_void) -> c_int;
type SetWorkspace = unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int;
type Gemm = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// cuBLAS on the stream of a GPU.
#[derive(Debug)]
pub struct Cublas {
    handle: Handle,
    gemm: Gemm,
    destroy: Destroy,
    /// The name it was found by.
    name: &'static str,
    set_workspace: SetWorkspace,
    workspace: Option<Buffer>,
    /// The handle is of its context.
    _stream: Arc<CudaStream>,
    _library: Library,
}

/// What is written of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// As our kernels write.
    F32,
    /// As a model in BF16 writes: half the bytes.
    Bf16,
}

fn done(call: &str, status: c_int) -> Result<()> {
    match status {
        0 => Ok(()),
        status => Err(Error::Driver { call: call.to_owned(), reason: format!("status {status}") }),
    }
}

/// A function of the library.
///
/// # Safety
/// It has the type `F`.
#[allow(unsafe_code)]
unsafe fn function<F: Copy>(library: &Library, name: &str, symbol: &str) -> Result<F> {
    // SAFETY: as this function's own.
    match unsafe { library.get::<F>(symbol) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(Error::Unavailable(format!("{name} lacks the function {symbol}"))),
    }
}

impl Cublas {
    /// Loads the library and works on the stream of `cuda`. [`Self::take_workspace`] comes next.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where libcublas is not installed.
    #[allow(unsafe_code)]
    pub fn open(cuda: &Cuda) -> Result<Self> {
        let found = NAMES.into_iter().find_map(|name| {
            // SAFETY: NVIDIA's library; its initialisers do nothing else.
            unsafe { Library::new(name) }.ok().map(|library| (name, library))
        });
        let (name, library) = found.ok_or_else(|| {
            Error::Unavailable(format!(
                "cuBLAS was not found ({}): install CUDA's or put its directory into LD_LIBRARY_PATH",
                NAMES.join(", ")
            ))
        })?;
        // SAFETY: the signatures are those of cublas_api.h; the handle is made before it is used and destroyed in `drop`,
        // before the library and the workspace go; the driver's and the runtime's streams are one type.
        unsafe {
            let create: Create = function(&library, name, "cublasCreate_v2")?;
            let destroy: Destroy = function(&library, name, "cublasDestroy_v2")?;
            let set_stream: SetStream = function(&library, name, "cublasSetStream_v2")?;
            let set_workspace: SetWorkspace = function(&library, name, "cublasSetWorkspace_v2")?;
            let gemm: Gemm = function(&library, name, "cublasGemmEx")?;
            cuda.bind()?;
            let mut handle = std::ptr::null_mut();
            done("cublasCreate", create(&mut handle))?;
            let cublas = Self {
                handle,
                gemm,
                destroy,
                name,
                set_workspace,
                workspace: None,
                _stream: cuda.stream().clone(),
                _library: library,
            };
            done("cublasSetStream", set_stream(handle, cuda.stream().cu_stream().cast()))?;
            Ok(cublas)
        }
    }

    /// Gives the library memory to work in, so that it allocates none in the middle of a recording.
    ///
    /// # Errors
    /// Not so much memory; the library's own.
    #[allow(unsafe_code)]
    pub fn take_workspace(&mut self, gpu: &Gpu) -> Result<()> {
        let workspace = gpu.allocate(WORKSPACE_BYTES)?;
        // SAFETY: the buffer lives as long as the handle does.
        done("cublasSetWorkspace", unsafe {
            (self.set_workspace)(self.handle, pointer(workspace.view()), workspace.bytes())
        })?;
        self.workspace = Some(workspace);
        Ok(())
    }

    /// The name it was found by.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// `y = x W^T`: W `BF16 [n, k]`, x `BF16 [m, ldx]`, y `[m, n]`, all row-major; sums in F32.
    ///
    /// # Errors
    /// A buffer is too small; the library's own.
    #[allow(unsafe_code)]
    #[expect(clippy::too_many_arguments, reason = "the operands of a matrix product")]
    pub fn product(
        &self,
        w: View<'_>,
        x: View<'_>,
        y: View<'_>,
        output: Output,
        n: usize,
        k: usize,
        m: usize,
        ldx: usize,
    ) -> Result<()> {
        let (kind, bytes) = match output {
            Output::F32 => (R_32F, 4),
            Output::Bf16 => (R_16BF, 2),
        };
        w.require("w", n * k * 2)?;
        x.require("x", m * ldx * 2)?;
        y.require("y", m * n * bytes)?;
        let size = |x: usize| c_int::try_from(x).map_err(|_| Error::Unsupported(format!("a size of {x}")));
        let (one, zero) = (1f32, 0f32);
        // SAFETY: the buffers have the sizes that the shapes need, and the constants outlive the call. Column-major,
        // as the library thinks, the product is y^T = W x^T.
        let status = unsafe {
            (self.gemm)(
                self.handle,
                OP_T,
                OP_N,
                size(n)?,
                size(m)?,
                size(k)?,
                (&raw const one).cast(),
                pointer(w),
                R_16BF,
                size(k)?,
                pointer(x),
                R_16BF,
                size(ldx)?,
                (&raw const zero).cast(),
                pointer(y),
                kind,
                size(n)?,
                COMPUTE_32F,
                ALGORITHM_DEFAULT,
            )
        };
        done("cublasGemmEx", status)
    }
}

fn pointer(view: View<'_>) -> *mut c_void {
    match view.pointer() {
        Argument::Pointer(address) => address as *mut c_void,
        _ => std::ptr::null_mut(),
    }
}

impl Drop for Cublas {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `open`, and the library is still loaded.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}
