//! The five functions of cuBLAS that products are measured with.

#![allow(unsafe_code, non_snake_case)]

use std::ffi::c_void;

use crate::product::Product;
use crate::state::{State, with_state};
use crate::things::{Cublas, Handle};
use crate::work::Work;

// cublasStatus_t.
const SUCCESS: i32 = 0;
const NOT_INITIALIZED: i32 = 1;
const INVALID_VALUE: i32 = 7;
const INTERNAL_ERROR: i32 = 14;
const NOT_SUPPORTED: i32 = 15;

// cublasOperation_t, cudaDataType, cublasComputeType_t.
const OP_N: i32 = 0;
const OP_T: i32 = 1;
const R_32F: i32 = 0;
const R_16BF: i32 = 14;
const COMPUTE_32F: i32 = 68;

/// Answers a call as the driver's are answered; a status of the library's in place of the driver's.
fn enter(name: &'static str, body: impl FnOnce(&mut State) -> std::result::Result<(), i32>) -> i32 {
    with_state(|state| {
        let status = body(state).err().unwrap_or(SUCCESS);
        state.log.call(name, crate::code::Code(if status == SUCCESS { 0 } else { -status }));
        status
    })
}

impl State {
    fn cublas(&mut self, handle: Handle) -> std::result::Result<&mut Cublas, i32> {
        let device = self.current().map_err(|_| NOT_INITIALIZED)?;
        if self.cublas.get(&handle).is_none_or(|found| found.device != device) {
            self.wrong("cuBLAS handle");
            return Err(NOT_INITIALIZED);
        }
        self.cublas.get_mut(&handle).ok_or(NOT_INITIALIZED)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasCreate_v2(handle: *mut Handle) -> i32 {
    enter("cublasCreate_v2", |state| {
        let device = state.current().map_err(|_| NOT_INITIALIZED)?;
        state.potentially_unsafe("cublasCreate").map_err(|_| INTERNAL_ERROR)?;
        let made = state.handle();
        state.cublas.insert(made, Cublas { device, stream: 0, workspace: None });
        // SAFETY: the caller gives room for a handle.
        unsafe { handle.as_mut() }.map(|handle| *handle = made).ok_or(INVALID_VALUE)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasDestroy_v2(handle: Handle) -> i32 {
    enter("cublasDestroy_v2", |state| {
        state.cublas(handle)?;
        state.cublas.remove(&handle);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasSetStream_v2(handle: Handle, stream: Handle) -> i32 {
    enter("cublasSetStream_v2", |state| {
        let stream = state.stream(stream).map_err(|_| INVALID_VALUE)?;
        let found = state.cublas(handle)?;
        // As documented: a new stream takes the workspace away.
        (found.stream, found.workspace) = (stream, None);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasSetWorkspace_v2(handle: Handle, workspace: u64, bytes: usize) -> i32 {
    enter("cublasSetWorkspace_v2", |state| {
        let device = state.cublas(handle)?.device;
        state.inside(device, workspace, bytes).map_err(|_| INVALID_VALUE)?;
        if !workspace.is_multiple_of(256) {
            return Err(INVALID_VALUE);
        }
        state.cublas(handle)?.workspace = Some((workspace, bytes));
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasGemmEx(
    handle: Handle,
    of_a: i32,
    of_b: i32,
    m: i32,
    n: i32,
    k: i32,
    alpha: *const c_void,
    a: u64,
    kind_of_a: i32,
    lda: i32,
    b: u64,
    kind_of_b: i32,
    ldb: i32,
    beta: *const c_void,
    c: u64,
    kind_of_c: i32,
    ldc: i32,
    compute: i32,
    _algorithm: i32,
) -> i32 {
    enter("cublasGemmEx", |state| {
        let &mut Cublas { device, stream, workspace } = state.cublas(handle)?;
        let stream = state.stream(stream).map_err(|_| NOT_INITIALIZED)?;
        if (of_a, of_b, kind_of_a, kind_of_b, compute) != (OP_T, OP_N, R_16BF, R_16BF, COMPUTE_32F)
            || !matches!(kind_of_c, R_32F | R_16BF)
        {
            return Err(NOT_SUPPORTED);
        }
        let size = |x: i32| usize::try_from(x).ok().filter(|x| *x > 0).ok_or(INVALID_VALUE);
        let (m, n, k) = (size(m)?, size(n)?, size(k)?);
        let (lda, ldb, ldc) = (size(lda)?, size(ldb)?, size(ldc)?);
        if lda < k || ldb < k || ldc < m {
            return Err(INVALID_VALUE);
        }
        // SAFETY: where sums are F32, both point to an F32 of the host, which is the mode that nobody changed.
        let scales = unsafe { (alpha.cast::<f32>().as_ref(), beta.cast::<f32>().as_ref()) };
        let (Some(&alpha), Some(&beta)) = scales else { return Err(INVALID_VALUE) };
        let product =
            Product { m, n, k, alpha, beta, a: (a, lda), b: (b, ldb), c: (c, ldc), wide: kind_of_c == R_32F };
        for (address, bytes) in product.sizes() {
            state.inside(device, address, bytes).map_err(|_| INVALID_VALUE)?;
        }
        match workspace {
            Some((address, bytes)) => state.inside(device, address, bytes).map_err(|_| INTERNAL_ERROR)?,
            // It would allocate one.
            None if state.capturing(stream) => {
                state.log.fault("cublasGemmEx without a workspace during a capture");
                return Err(INTERNAL_ERROR);
            }
            None => {}
        }
        state.put(stream, Work::Product(product)).map_err(|_| INTERNAL_ERROR)
    })
}
