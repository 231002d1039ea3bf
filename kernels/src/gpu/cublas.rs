//! NVIDIA's own matrix product, to be measured beside ours. Loaded when it is asked for, if it is installed.

use std::ffi::c_void;

use cudarc::cublas::{result, sys};

use super::cuda::Cuda;
use super::{Argument, Error, Result, View};

/// cuBLAS on the stream of a GPU.
#[derive(Debug)]
pub struct Cublas(sys::cublasHandle_t);

fn failed(call: &str) -> impl FnOnce(cudarc::cublas::result::CublasError) -> Error + '_ {
    move |e| Error::Driver { call: call.to_owned(), reason: format!("{e:?}") }
}

impl Cublas {
    /// Loads the library and works on the stream of `cuda`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where libcublas is not installed.
    #[allow(unsafe_code)]
    pub fn open(cuda: &Cuda) -> Result<Self> {
        // SAFETY: loads the library and unloads it.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unavailable(
                "libcublas was not found: install CUDA 12's or put its directory into LD_LIBRARY_PATH"
                    .to_owned(),
            ));
        }
        let handle = result::create_handle().map_err(failed("cublasCreate"))?;
        let cublas = Self(handle);
        // SAFETY: the handle was just made; the driver's and the runtime's streams are one type.
        unsafe { result::set_stream(handle, cuda.stream().cu_stream().cast()) }
            .map_err(failed("cublasSetStream"))?;
        Ok(cublas)
    }

    /// `y = x W^T`: W `BF16 [n, k]`, x `BF16 [m, ldx]`, y `F32 [m, n]`, all row-major; sums in F32.
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
        n: usize,
        k: usize,
        m: usize,
        ldx: usize,
    ) -> Result<()> {
        w.require("w", n * k * 2)?;
        x.require("x", m * ldx * 2)?;
        y.require("y", m * n * 4)?;
        let size = |x: usize| i32::try_from(x).map_err(|_| Error::Unsupported(format!("a size of {x}")));
        let pointer = |view: View<'_>| match view.pointer() {
            Argument::Pointer(address) => address as *mut c_void,
            _ => std::ptr::null_mut(),
        };
        let (one, zero) = (1f32, 0f32);
        // SAFETY: the buffers have the sizes that the shapes need, and the constants outlive the call. Column-major,
        // as the library thinks, the product is y^T = W x^T.
        unsafe {
            result::gemm_ex(
                self.0,
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                size(n)?,
                size(m)?,
                size(k)?,
                (&raw const one).cast(),
                pointer(w),
                sys::cudaDataType::CUDA_R_16BF,
                size(k)?,
                pointer(x),
                sys::cudaDataType::CUDA_R_16BF,
                size(ldx)?,
                (&raw const zero).cast(),
                pointer(y),
                sys::cudaDataType::CUDA_R_32F,
                size(n)?,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(failed("cublasGemmEx"))
    }
}

impl Drop for Cublas {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `open`.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}
