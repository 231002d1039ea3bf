//! The functions of the driver's library that are called. A library without one of them would end the process where it
//! is called.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::{Error, Result};

/// What says which GPUs there are.
pub(super) const TO_ASK: &[&str] = &[
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
];

/// What runs kernels.
pub(super) const TO_RUN: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuMemAllocHost_v2",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyHtoD_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamIsCapturing",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// Refuses a library that lacks one of these. It must be there.
pub(super) fn check(names: &[&str]) -> Result<()> {
    // SAFETY: the library stays loaded; addresses are looked up and not called.
    #[allow(unsafe_code)]
    let missing = unsafe {
        let library = sys::culib();
        names.iter().find(|name| library.get::<*const c_void>(name.as_bytes()).is_err())
    };
    match missing {
        None => Ok(()),
        Some(name) => Err(Error::Unavailable(format!(
            "the CUDA driver's library (libcuda.so.1) has no {name}: install the NVIDIA driver anew, 550 or newer"
        ))),
    }
}
