//! Memory of the GPU, page-locked memory of the host, and copies.

use std::ffi::c_void;
use std::sync::Arc;

use llmpress_kernels::gpu::Backend;

use super::give;
use crate::code::{Code, Outcome};
use crate::state::{State, enter};
use crate::things::Handle;
use crate::work::Work;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> i32 {
    enter("cuMemAlloc_v2", |state| {
        state.log.note(bytes.to_string());
        let device = state.current()?;
        state.potentially_unsafe("cuMemAlloc")?;
        if bytes == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let free = state.settings.memory - state.devices[device].used;
        if bytes > free {
            return Err(Code::OUT_OF_MEMORY);
        }
        let device = &mut state.devices[device];
        let emulator = device.emulator.as_ref().ok_or(Code::CONTEXT_IS_DESTROYED)?;
        let found = emulator.allocate(bytes).map_err(|_| Code::OUT_OF_MEMORY)?;
        device.used += bytes;
        device.allocations.insert(found, bytes);
        // SAFETY: the caller gives room for an address.
        unsafe { give(address, found) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> i32 {
    enter("cuMemFree_v2", |state| {
        let device = state.current()?;
        state.potentially_unsafe("cuMemFree")?;
        if address == 0 {
            return Ok(());
        }
        if !state.devices[device].allocations.contains_key(&address) {
            state
                .log
                .fault(&format!("memory given back at {address:#x}, where none was taken, or not any more"));
            return Err(Code::INVALID_VALUE);
        }
        // The driver waits for kernels that may use it.
        state.drain_device(device)?;
        let device = &mut state.devices[device];
        device.used -= device.allocations.remove(&address).unwrap_or(0);
        if let Some(emulator) = &device.emulator {
            emulator.free(address);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> i32 {
    enter("cuMemGetInfo_v2", |state| {
        let device = state.current()?;
        let all = state.settings.memory;
        // SAFETY: the caller gives room for two numbers.
        unsafe { give(free, all - state.devices[device].used).and_then(|()| give(total, all)) }
    })
}

/// Page-locked memory of the host.
///
/// # Safety
/// `address` is null or has room for a pointer.
unsafe fn host(state: &mut State, address: *mut *mut c_void, bytes: usize) -> Outcome {
    state.current()?;
    state.potentially_unsafe("page-locked memory")?;
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let mut memory = vec![u64::MAX; bytes.div_ceil(8)];
    let found = memory.as_mut_ptr();
    state.host.insert(found as usize, memory);
    // SAFETY: as the caller promises.
    unsafe { give(address, found.cast()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocHost_v2(address: *mut *mut c_void, bytes: usize) -> i32 {
    // SAFETY: the caller gives room for a pointer.
    enter("cuMemAllocHost_v2", |state| unsafe { host(state, address, bytes) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: u32) -> i32 {
    // SAFETY: the caller gives room for a pointer.
    enter("cuMemHostAlloc", |state| unsafe { host(state, address, bytes) })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(address: *mut c_void) -> i32 {
    enter("cuMemFreeHost", |state| {
        let device = state.current()?;
        state.potentially_unsafe("cuMemFreeHost")?;
        state.drain_device(device)?;
        if state.host.remove(&(address as usize)).is_none() {
            state.log.fault("page-locked memory given back that is none, or not any more");
            return Err(Code::INVALID_VALUE);
        }
        Ok(())
    })
}

/// A copy to the GPU. The bytes are taken at once, as the driver does with memory that is not page-locked.
///
/// # Safety
/// `from` has so many bytes.
unsafe fn write(state: &mut State, to: u64, from: *const c_void, bytes: usize, stream: Handle) -> Outcome {
    state.log.note(bytes.to_string());
    let (device, stream) = (state.current()?, state.stream(stream)?);
    state.waits("a copy from the host", Some(stream))?;
    state.inside(device, to, bytes)?;
    if from.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: as the caller promises.
    let data: Arc<[u8]> = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) }.into();
    state.put(stream, Work::Write { to, data })
}

/// A copy to the host, done when the call returns, as the driver does with memory that is not page-locked.
///
/// # Safety
/// `to` has room for so many bytes.
unsafe fn read(state: &mut State, to: *mut c_void, from: u64, bytes: usize, stream: Handle) -> Outcome {
    state.log.note(bytes.to_string());
    let (device, stream) = (state.current()?, state.stream(stream)?);
    state.waits("a copy to the host", Some(stream))?;
    state.inside(device, from, bytes)?;
    if to.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    state.drain(stream)?;
    let emulator = state.devices[device].emulator.as_ref().ok_or(Code::CONTEXT_IS_DESTROYED)?;
    // SAFETY: as the caller promises.
    let data = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), bytes) };
    emulator.read(from, data).map_err(|_| Code::INVALID_VALUE)
}

fn copy(state: &mut State, to: u64, from: u64, bytes: usize, stream: Handle) -> Outcome {
    state.log.note(bytes.to_string());
    let (device, stream) = (state.current()?, state.stream(stream)?);
    state.inside(device, from, bytes)?;
    state.inside(device, to, bytes)?;
    let (first, second) = (from.min(to), from.max(to));
    if second - first < bytes as u64 {
        state.log.fault("a copy between ranges that overlap");
        return Err(Code::INVALID_VALUE);
    }
    state.put(stream, Work::Copy { from, to, bytes })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) -> i32 {
    // SAFETY: the caller gives so many bytes.
    enter("cuMemcpyHtoDAsync_v2", |state| unsafe { write(state, to, from, bytes, stream) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) -> i32 {
    // SAFETY: the caller gives room for so many bytes.
    enter("cuMemcpyDtoHAsync_v2", |state| unsafe { read(state, to, from, bytes, stream) })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> i32 {
    enter("cuMemcpyDtoDAsync_v2", |state| copy(state, to, from, bytes, stream))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> i32 {
    enter("cuMemcpyHtoD_v2", |state| {
        state.potentially_unsafe("cuMemcpyHtoD")?;
        // SAFETY: the caller gives so many bytes.
        unsafe { write(state, to, from, bytes, 0) }?;
        let legacy = state.stream(0)?;
        state.drain(legacy)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> i32 {
    enter("cuMemcpyDtoH_v2", |state| {
        state.potentially_unsafe("cuMemcpyDtoH")?;
        // SAFETY: the caller gives room for so many bytes.
        unsafe { read(state, to, from, bytes, 0) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> i32 {
    enter("cuMemcpyDtoD_v2", |state| copy(state, to, from, bytes, 0))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(at: u64, value: u8, bytes: usize, stream: Handle) -> i32 {
    enter("cuMemsetD8Async", |state| {
        let (device, stream) = (state.current()?, state.stream(stream)?);
        state.inside(device, at, bytes)?;
        state.put(stream, Work::Fill { at, value, bytes })
    })
}
