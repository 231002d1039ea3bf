//! Primary contexts.

use std::collections::VecDeque;

use llmpress_emulator::Emulator;

use super::give;
use crate::code::Code;
use crate::state::{CURRENT, enter};
use crate::things::{Handle, Stream};

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: i32) -> i32 {
    enter("cuDevicePrimaryCtxRetain", |state| {
        let index = state.device(device)?;
        if state.devices[index].retained == 0 {
            let made = state.handle();
            let shared = state.settings.shared;
            let device = &mut state.devices[index];
            device.context = made;
            device.emulator = Some(Emulator::with_shared_limit(shared));
            let legacy = Stream { context: made, blocking: true, queue: VecDeque::new(), capture: None };
            state.streams.insert(made, legacy);
        }
        let device = &mut state.devices[index];
        device.retained += 1;
        // SAFETY: the caller gives room for a handle.
        unsafe { give(context, device.context) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> i32 {
    enter("cuDevicePrimaryCtxRelease_v2", |state| {
        let index = state.device(device)?;
        match state.devices[index].retained {
            0 => {
                state.log.fault("a context given back that nobody holds");
                return Err(Code::INVALID_CONTEXT);
            }
            1 => state.end_context(index),
            _ => state.devices[index].retained -= 1,
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> i32 {
    enter("cuCtxGetCurrent", |state| {
        state.started()?;
        // SAFETY: the caller gives room for a handle.
        unsafe { give(context, CURRENT.get()) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> i32 {
    enter("cuCtxSetCurrent", |state| {
        state.started()?;
        let known = state.devices.iter().any(|device| device.context == context && device.retained > 0);
        if context != 0 && !known {
            state.log.fault("a context that is none, or not any more");
            return Err(Code::INVALID_CONTEXT);
        }
        CURRENT.set(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetDevice(device: *mut i32) -> i32 {
    enter("cuCtxGetDevice", |state| {
        let current = state.current()?;
        // SAFETY: the caller gives room for a number.
        unsafe { give(device, current as i32) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> i32 {
    enter("cuCtxSynchronize", |state| {
        let device = state.current()?;
        state.waits("cuCtxSynchronize", None)?;
        state.drain_device(device)
    })
}
