//! Launches, and what a function may be launched with.

use std::ffi::c_void;
use std::sync::Arc;

use super::give;
use crate::code::{Code, Outcome};
use crate::state::{State, enter};
use crate::things::{Function, Handle};
use crate::work::{Launched, Work};

// CUfunction_attribute.
const MAX_THREADS: u32 = 0;
const STATIC_SHARED: u32 = 1;
const DYNAMIC_SHARED: u32 = 8;
const CARVEOUT: u32 = 9;

/// CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.
const PROGRAMMATIC_SERIALIZATION: u32 = 6;

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, attribute: u32, value: i32) -> i32 {
    enter("cuFuncSetAttribute", |state| {
        state.log.note(format!("{attribute}, {value}"));
        state.function(function)?;
        let limit = state.settings.shared;
        let Some(found) = state.functions.get_mut(&function) else { return Err(Code::INVALID_HANDLE) };
        match attribute {
            DYNAMIC_SHARED => {
                let bytes = u32::try_from(value).ok().filter(|bytes| *bytes <= limit);
                found.shared = bytes.ok_or(Code::INVALID_VALUE)?;
                Ok(())
            }
            // A hint: a share of the memory, or -1 for the default.
            CARVEOUT if (-1..=100).contains(&value) => Ok(()),
            _ => Err(Code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetAttribute(value: *mut i32, attribute: u32, function: Handle) -> i32 {
    enter("cuFuncGetAttribute", |state| {
        let found = state.function(function)?;
        let found = match attribute {
            MAX_THREADS => found.threads,
            STATIC_SHARED => 0,
            DYNAMIC_SHARED => found.shared,
            _ => return Err(Code::INVALID_VALUE),
        };
        // SAFETY: the caller gives room for a number.
        unsafe { give(value, found as i32) }
    })
}

/// The sizes of a launch.
struct Shape {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    /// Programmatic serialisation.
    overlaps: bool,
}

fn check(state: &mut State, function: &Function, shape: &Shape) -> Outcome {
    let threads = shape.block.iter().fold(1u32, |all, size| all.saturating_mul(*size));
    let what = if shape.grid.contains(&0) || shape.grid[1].max(shape.grid[2]) > 65535 {
        format!("a grid of {:?}", shape.grid)
    } else if threads == 0 || threads > function.threads || shape.block[1..] != [1, 1] {
        format!("blocks of {:?}, compiled for {} threads", shape.block, function.threads)
    } else if shape.shared > function.shared {
        format!("{} bytes of shared memory where {} were asked for", shape.shared, function.shared)
    } else {
        return Ok(());
    };
    state.log.fault(&format!("{}/{} is launched with {what}", function.file, function.name));
    Err(Code::INVALID_VALUE)
}

/// Puts a launch on a stream.
///
/// # Safety
/// `arguments` points to as many pointers as the kernel takes arguments, and each to such an argument.
unsafe fn launch(
    state: &mut State,
    function: Handle,
    shape: Shape,
    stream: Handle,
    arguments: *const *const c_void,
    extra: *const c_void,
) -> Outcome {
    let function = state.function(function)?;
    state.log.note(format!("{}/{} {:?}", function.file, function.name, shape.grid));
    let stream = state.stream(stream)?;
    check(state, &function, &shape)?;
    if !extra.is_null() || (arguments.is_null() && !function.parameters.is_empty()) {
        return Err(Code::INVALID_VALUE);
    }
    let mut copied = Vec::with_capacity(function.parameters.len());
    for (index, parameter) in function.parameters.iter().enumerate() {
        // SAFETY: as the caller promises. The driver reads as many bytes as the parameter has, and so does this.
        let slot = unsafe {
            let at = *arguments.add(index);
            if at.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            match parameter.bytes() {
                8 => at.cast::<u64>().read_unaligned(),
                _ => u64::from(at.cast::<u32>().read_unaligned()),
            }
        };
        copied.push(parameter.argument(slot));
    }
    let launched = Launched {
        module: function.module,
        file: function.file,
        kernel: function.name,
        grid: shape.grid,
        block: shape.block[0],
        shared: shape.shared,
        arguments: copied,
        overlaps: shape.overlaps,
    };
    state.put(stream, Work::Launch(Arc::new(launched)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared: u32,
    stream: Handle,
    arguments: *const *const c_void,
    extra: *const c_void,
) -> i32 {
    let shape =
        Shape { grid: [grid_x, grid_y, grid_z], block: [block_x, block_y, block_z], shared, overlaps: false };
    // SAFETY: the caller gives what the kernel takes.
    enter("cuLaunchKernel", |state| unsafe { launch(state, function, shape, stream, arguments, extra) })
}

/// `CUlaunchConfig`.
#[repr(C)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Handle,
    attributes: *const Attribute,
    count: u32,
}

/// `CUlaunchAttribute`.
#[repr(C)]
struct Attribute {
    id: u32,
    _padding: u32,
    value: [u32; 16],
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernelEx(
    config: *const Config,
    function: Handle,
    arguments: *const *const c_void,
    extra: *const c_void,
) -> i32 {
    enter("cuLaunchKernelEx", |state| {
        // SAFETY: the caller gives a configuration.
        let config = unsafe { config.as_ref() }.ok_or(Code::INVALID_VALUE)?;
        let attributes = match config.count as usize {
            0 => &[][..],
            _ if config.attributes.is_null() => return Err(Code::INVALID_VALUE),
            // SAFETY: the configuration has so many attributes.
            count => unsafe { std::slice::from_raw_parts(config.attributes, count) },
        };
        let mut overlaps = false;
        for attribute in attributes {
            match attribute.id {
                0 => {}
                // Of Hopper and newer GPUs; kernels run one after the other here whatever it says.
                PROGRAMMATIC_SERIALIZATION if state.settings.capability >= (9, 0) => {
                    if attribute.value[0] > 1 {
                        return Err(Code::INVALID_VALUE);
                    }
                    overlaps = attribute.value[0] == 1;
                }
                _ => return Err(Code::NOT_SUPPORTED),
            }
        }
        let shape = Shape { grid: config.grid, block: config.block, shared: config.shared, overlaps };
        // SAFETY: the caller gives what the kernel takes.
        unsafe { launch(state, function, shape, config.stream, arguments, extra) }
    })
}
