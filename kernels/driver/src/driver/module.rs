//! Modules from PTX, and their functions.

use std::ffi::{CStr, c_char, c_void};

use llmpress_emulator::{Parameter, parameters};
use llmpress_kernels::gpu::modules;

use super::give;
use crate::code::{Code, Outcome};
use crate::ptx::{self, Entry};
use crate::state::{State, enter};
use crate::things::{Function, Handle, Module};

// CUjit_option.
const INFO_BUFFER: u32 = 3;
const INFO_BYTES: u32 = 4;
const ERROR_BUFFER: u32 = 5;
const ERROR_BYTES: u32 = 6;
const OPTIONS: u32 = 34;

/// A module, or why there is none and what the compiler says of it.
fn load(state: &mut State, text: &str) -> Result<Handle, (Code, String)> {
    let silent = |code| (code, String::new());
    let device = state.current().map_err(silent)?;
    state.potentially_unsafe("loading a module").map_err(silent)?;
    let module = ptx::parse(text)
        .map_err(|e| (Code::INVALID_PTX, format!("ptxas application ptx input, line 1; fatal : {e}")))?;
    // PTX 8.4 came with CUDA 12.4, PTX 7.8 with 11.8, and so on.
    let driver = state.settings.driver;
    if module.version > (driver / 1000 - 4, driver % 1000 / 10) {
        let (major, minor) = module.version;
        let said =
            format!("ptxas application ptx input, line 9; fatal : Unsupported .version {major}.{minor}");
        return Err((Code::UNSUPPORTED_PTX_VERSION, said));
    }
    let (major, minor) = state.settings.capability;
    let capability = 10 * major + minor;
    if module.target > capability || (module.only && module.target != capability) {
        return Err(silent(Code::NO_BINARY_FOR_GPU));
    }
    if let Some(refused) =
        module.entries.iter().find(|entry| Some(&entry.name) == state.settings.refuse.as_ref())
    {
        let said = format!(
            "ptxas application ptx input, line 24; error : {} is refused by the stand-in",
            refused.name
        );
        return Err((Code::INVALID_PTX, said));
    }
    let (context, made) = (state.devices[device].context, state.handle());
    state.modules.insert(made, Module { context, entries: module.entries });
    Ok(made)
}

/// The text at `image`: PTX ends in a zero byte.
///
/// # Safety
/// `image` is null or ends in a zero byte.
unsafe fn text(image: *const c_void) -> Outcome<String> {
    if image.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: as the caller promises.
    Ok(unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy().into_owned())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> i32 {
    enter("cuModuleLoadData", |state| {
        // SAFETY: the caller gives PTX that ends in a zero byte.
        let text = unsafe { text(image) }?;
        let made = load(state, &text).map_err(|(code, _)| code)?;
        // SAFETY: the caller gives room for a handle.
        unsafe { give(module, made) }
    })
}

/// Puts a text into the buffer of an option, and its size into the option that gave the buffer's.
///
/// # Safety
/// The buffer, if there is one, has the size that its option says.
unsafe fn tell(said: &str, options: &[u32], values: &mut [*mut c_void], buffer: u32, bytes: u32) {
    let of = |wanted| options.iter().position(|option| *option == wanted);
    let (Some(buffer), Some(bytes)) = (of(buffer), of(bytes)) else { return };
    let room = values[bytes] as usize;
    if room == 0 || values[buffer].is_null() {
        return;
    }
    let count = said.len().min(room - 1);
    // SAFETY: as the caller promises; a byte is left for the zero.
    unsafe {
        let to = values[buffer].cast::<u8>();
        to.copy_from_nonoverlapping(said.as_ptr(), count);
        to.add(count).write(0);
    }
    values[bytes] = std::ptr::without_provenance_mut(count + 1);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut Handle,
    image: *const c_void,
    count: u32,
    options: *const u32,
    values: *mut *mut c_void,
) -> i32 {
    enter("cuModuleLoadDataEx", |state| {
        // SAFETY: the caller gives PTX that ends in a zero byte.
        let text = unsafe { text(image) }?;
        if count > 0 && (options.is_null() || values.is_null()) {
            return Err(Code::INVALID_VALUE);
        }
        let (options, values) = match count as usize {
            0 => (&[][..], &mut [][..]),
            // SAFETY: the caller gives so many options and values.
            count => unsafe {
                (std::slice::from_raw_parts(options, count), std::slice::from_raw_parts_mut(values, count))
            },
        };
        if options.iter().any(|option| *option >= OPTIONS) {
            return Err(Code::INVALID_VALUE);
        }
        match load(state, &text) {
            Ok(made) => {
                // SAFETY: the caller says how large its buffers are.
                unsafe { tell("ptxas info : compiled", options, values, INFO_BUFFER, INFO_BYTES) };
                // SAFETY: the caller gives room for a handle.
                unsafe { give(module, made) }
            }
            Err((code, said)) => {
                // SAFETY: the caller says how large its buffers are.
                unsafe { tell(&said, options, values, ERROR_BUFFER, ERROR_BYTES) };
                Err(code)
            }
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> i32 {
    enter("cuModuleUnload", |state| {
        state.current()?;
        state.potentially_unsafe("cuModuleUnload")?;
        if state.modules.remove(&module).is_none() {
            return Err(state.wrong("module"));
        }
        Ok(())
    })
}

/// The source of a kernel, and what it takes there.
fn source(name: &str) -> Option<(&'static str, Vec<Parameter>)> {
    modules().into_iter().find_map(|file| Some((file, parameters(file, name)?)))
}

fn function(state: &mut State, module: Handle, name: &str) -> Outcome<Handle> {
    state.current()?;
    // Functions are compiled when they are asked for.
    state.potentially_unsafe("cuModuleGetFunction")?;
    let Some(found) = state.modules.get(&module) else { return Err(state.wrong("module")) };
    let Some(Entry { parameters: bytes, threads, .. }) =
        found.entries.iter().find(|entry| entry.name == name)
    else {
        return Err(Code::NOT_FOUND);
    };
    let (bytes, threads) = (bytes.clone(), *threads);
    let Some((file, parameters)) = source(name) else {
        state.log.fault(&format!("{name} is in the PTX, but in no source"));
        return Err(Code::NOT_FOUND);
    };
    if !parameters.iter().map(|parameter| parameter.bytes()).eq(bytes.iter().copied()) {
        state.log.fault(&format!(
            "{file}/{name} takes {parameters:?} in its source, but {bytes:?} bytes in the PTX"
        ));
        return Err(Code::NOT_FOUND);
    }
    // Kernels are named by texts of the program: these few live as long.
    let known = state.functions.values().find(|function| function.name == name).map(|function| function.name);
    let name = known.unwrap_or_else(|| Box::leak(name.to_owned().into_boxed_str()));
    let made = state.handle();
    state.functions.insert(made, Function::new(module, file, name, parameters, threads));
    Ok(made)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(found: *mut Handle, module: Handle, name: *const c_char) -> i32 {
    enter("cuModuleGetFunction", |state| {
        if name.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the caller gives a name that ends in a zero byte.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        state.log.note(name.clone());
        let made = function(state, module, &name)?;
        // SAFETY: the caller gives room for a handle.
        unsafe { give(found, made) }
    })
}
