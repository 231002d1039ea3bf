//! Starting, versions, GPUs, names of errors.

use std::ffi::{CStr, c_char};

use super::give;
use crate::code::Code;
use crate::state::enter;

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: u32) -> i32 {
    enter("cuInit", |state| {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if state.settings.init != Code::SUCCESS {
            return Err(state.settings.init);
        }
        if state.settings.devices == 0 {
            return Err(Code::NO_DEVICE);
        }
        state.initialised = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut i32) -> i32 {
    enter("cuDriverGetVersion", |state| {
        // SAFETY: the caller gives room for a number.
        unsafe { give(version, state.settings.driver) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut i32) -> i32 {
    enter("cuDeviceGetCount", |state| {
        state.started()?;
        // SAFETY: the caller gives room for a number.
        unsafe { give(count, state.devices.len() as i32) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut i32, ordinal: i32) -> i32 {
    enter("cuDeviceGet", |state| {
        state.device(ordinal)?;
        // SAFETY: the caller gives room for a number.
        unsafe { give(device, ordinal) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, bytes: i32, device: i32) -> i32 {
    enter("cuDeviceGetName", |state| {
        state.device(device)?;
        let text = c"Stand-in".to_bytes_with_nul();
        if name.is_null() || usize::try_from(bytes).is_ok_and(|bytes| bytes < text.len()) || bytes < 0 {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the caller gives room for so many bytes.
        unsafe { name.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) -> i32 {
    enter("cuDeviceTotalMem_v2", |state| {
        state.device(device)?;
        // SAFETY: the caller gives room for a number.
        unsafe { give(bytes, state.settings.memory) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut i32, attribute: u32, device: i32) -> i32 {
    enter("cuDeviceGetAttribute", |state| {
        state.device(device)?;
        let settings = &state.settings;
        // CUdevice_attribute.
        let found = match attribute {
            1..=3 => 1024,
            4 => 64,
            5 => i32::MAX,
            6 | 7 => 65535,
            8 => 48 << 10,
            10 => 32,
            13 => 1_000_000,
            16 => settings.multiprocessors,
            36 => 1_000_000,
            37 => 64,
            38 => 4 << 20,
            39 => 2048,
            75 => settings.capability.0,
            76 => settings.capability.1,
            81 => settings.shared as i32 + 1024,
            97 => settings.shared as i32,
            106 => 32,
            111 => 1024,
            // Integrated; memory pools, which are not stood in for.
            18 | 115 => 0,
            _ => return Err(Code::INVALID_VALUE),
        };
        // SAFETY: the caller gives room for a number.
        unsafe { give(value, found) }
    })
}

/// Names are given out whatever became of the GPU.
///
/// # Safety
/// `text` is null or has room for a pointer.
unsafe fn describe(
    code: i32,
    text: *mut *const c_char,
    which: impl Fn((&'static CStr, &'static CStr)) -> &'static CStr,
) -> i32 {
    let Some(described) = Code(code).described() else { return Code::INVALID_VALUE.0 };
    // SAFETY: as the caller promises.
    match unsafe { give(text, which(described).as_ptr()) } {
        Ok(()) => 0,
        Err(code) => code.0,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(code: i32, text: *mut *const c_char) -> i32 {
    // SAFETY: the caller gives room for a pointer.
    unsafe { describe(code, text, |(name, _)| name) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(code: i32, text: *mut *const c_char) -> i32 {
    // SAFETY: the caller gives room for a pointer.
    unsafe { describe(code, text, |(_, meaning)| meaning) }
}
