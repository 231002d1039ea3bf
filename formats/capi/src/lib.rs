//! The C interface of `formats`: opens a checkpoint, lists its tensors, decodes them or rows of them.
//!
//! ```text
//! llmpress_open --> LlmpressCheckpoint --llmpress_tensor_at, _find--> LlmpressTensor --llmpress_read, _read_rows--> the caller's buffer
//!      '--status, llmpress_error_message
//! ```
//!
//! `include/llmpress.h` is made of this by cbindgen, and a test compares them. Nothing unwinds into C: what panics is a status.

mod checkpoint;
mod fault;

use std::ffi::{CStr, c_char, c_void};
use std::path::Path;

use llmpress_formats::Error;

pub use checkpoint::{LlmpressCheckpoint, LlmpressTensor};
pub use fault::LlmpressStatus;
use fault::{caught, invalid};

/// Counts changes of this interface that programs compiled before do not bear.
pub const LLMPRESS_ABI_VERSION: u32 = 1;

/// The version of the library, such as "0.1.0". Static.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol")]
pub extern "C" fn llmpress_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// LLMPRESS_ABI_VERSION of the library that runs, to be compared with the one of the header.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol")]
pub extern "C" fn llmpress_abi_version() -> u32 {
    LLMPRESS_ABI_VERSION
}

/// What went wrong in this thread's last call that failed: one line that names file and tensor, and says what to do. Empty if none failed.
/// Valid until the next call of this thread.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol")]
pub extern "C" fn llmpress_error_message() -> *const c_char {
    fault::message()
}

/// Opens a directory of Hugging Face, llmpress or official DFloat11, or a GGUF file, and reads its headers. `path` is UTF-8. On success `*out`
/// is a checkpoint to be closed by llmpress_close, else NULL.
///
/// With `numbers` other than 0 matrices that another tool quantised are tensors of the numbers that they stand for; with 0 they are listed
/// as they are stored.
///
/// # Safety
/// `path` is a string that ends with NUL, `out` is valid for a pointer.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_open(
    path: *const c_char,
    numbers: i32,
    out: *mut *mut LlmpressCheckpoint,
) -> LlmpressStatus {
    // SAFETY: by contract; there is no base.
    unsafe { llmpress_open_with_base(path, numbers, std::ptr::null(), out) }
}

/// Opens a checkpoint that is stored as its difference from another one, `base`, as llmpress_open does; with NULL one that has no base.
///
/// Tensors that are read compare what they use of the base with its digest.
///
/// # Safety
/// `path` is a string that ends with NUL, `base` too or NULL, `out` is valid for a pointer.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_open_with_base(
    path: *const c_char,
    numbers: i32,
    base: *const c_char,
    out: *mut *mut LlmpressCheckpoint,
) -> LlmpressStatus {
    if out.is_null() {
        return fault::keep(invalid("out is NULL"));
    }
    // SAFETY: not NULL, and valid for a pointer by contract.
    unsafe { out.write(std::ptr::null_mut()) };
    caught(|| {
        // SAFETY: by contract.
        let path = unsafe { text(path, "path") }?;
        // SAFETY: by contract.
        let base = if base.is_null() { None } else { Some(unsafe { text(base, "base") }?) };
        let opened = LlmpressCheckpoint::open(Path::new(path), numbers != 0, base.map(Path::new))?;
        // SAFETY: as above.
        unsafe { out.write(Box::into_raw(Box::new(opened))) };
        Ok(())
    })
}

/// Closes a checkpoint; NULL is nothing to do. Its tensors are not to be used any more.
///
/// # Safety
/// It comes from llmpress_open, was not closed, and no other thread uses it.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes back what it gave to C")]
pub unsafe extern "C" fn llmpress_close(checkpoint: *mut LlmpressCheckpoint) {
    if !checkpoint.is_null() {
        // SAFETY: a box that `llmpress_open` gave away, by contract.
        let owned = unsafe { Box::from_raw(checkpoint) };
        let _ = caught(move || {
            drop(owned);
            Ok(())
        });
    }
}

/// How many tensors there are; 0 for NULL.
///
/// # Safety
/// NULL, or a checkpoint that is open.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_tensor_count(checkpoint: *const LlmpressCheckpoint) -> usize {
    // SAFETY: by contract.
    unsafe { checkpoint.as_ref() }.map_or(0, LlmpressCheckpoint::count)
}

/// A tensor by its number, in the order of names. What `*out` points to is the checkpoint's.
///
/// # Safety
/// A checkpoint that is open; `out` is valid for a tensor.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_tensor_at(
    checkpoint: *const LlmpressCheckpoint,
    index: usize,
    out: *mut LlmpressTensor,
) -> LlmpressStatus {
    caught(|| {
        // SAFETY: by contract.
        let tensor = unsafe { open(checkpoint) }?.at(index)?;
        // SAFETY: by contract.
        unsafe { put(out, tensor) }
    })
}

/// A tensor by its name.
///
/// # Safety
/// As of llmpress_tensor_at; `name` is a string that ends with NUL.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_tensor_find(
    checkpoint: *const LlmpressCheckpoint,
    name: *const c_char,
    out: *mut LlmpressTensor,
) -> LlmpressStatus {
    caught(|| {
        // SAFETY: by contract.
        let (checkpoint, name) = unsafe { (open(checkpoint)?, text(name, "name")?) };
        // SAFETY: by contract.
        unsafe { put(out, checkpoint.find(name)?) }
    })
}

/// Decodes a whole tensor into `out`, whose size must be the tensor's `bytes`. Any alignment will do.
///
/// # Safety
/// A checkpoint that is open; `name` is a string that ends with NUL; `out` is valid for `out_bytes`.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_read(
    checkpoint: *const LlmpressCheckpoint,
    name: *const c_char,
    out: *mut c_void,
    out_bytes: usize,
) -> LlmpressStatus {
    caught(|| {
        // SAFETY: by contract.
        let (checkpoint, name) = unsafe { (open(checkpoint)?, text(name, "name")?) };
        checkpoint.check_size(name, out_bytes)?;
        // SAFETY: by contract.
        checkpoint.read(name, unsafe { buffer(out, out_bytes) }?)
    })
}

/// Decodes rows `first` to `end`, without the last, of a tensor's first dimension. `out_bytes` must be their size: the tensor's `bytes`
/// over its number of rows, times `end - first`. No more is read than that takes.
///
/// # Safety
/// As of llmpress_read.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_read_rows(
    checkpoint: *const LlmpressCheckpoint,
    name: *const c_char,
    first: u64,
    end: u64,
    out: *mut c_void,
    out_bytes: usize,
) -> LlmpressStatus {
    caught(|| {
        // SAFETY: by contract.
        let (checkpoint, name) = unsafe { (open(checkpoint)?, text(name, "name")?) };
        // SAFETY: by contract.
        checkpoint.read_rows(name, first..end, unsafe { buffer(out, out_bytes) }?)
    })
}

/// The text of config.json, UTF-8, or NULL where there is none (also for NULL). The checkpoint's.
///
/// # Safety
/// NULL, or a checkpoint that is open.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "an exported symbol that takes pointers from C")]
pub unsafe extern "C" fn llmpress_config(checkpoint: *const LlmpressCheckpoint) -> *const c_char {
    // SAFETY: by contract.
    unsafe { checkpoint.as_ref() }.map_or(std::ptr::null(), LlmpressCheckpoint::config)
}

/// # Safety
/// NULL, or a checkpoint that is open for as long as the result is used.
#[allow(unsafe_code, reason = "a pointer from C")]
unsafe fn open<'a>(checkpoint: *const LlmpressCheckpoint) -> Result<&'a LlmpressCheckpoint, Error> {
    // SAFETY: by contract.
    unsafe { checkpoint.as_ref() }.ok_or_else(|| invalid("the checkpoint is NULL"))
}

/// # Safety
/// NULL, or a string that ends with NUL and stays as it is for as long as the result is used.
#[allow(unsafe_code, reason = "a pointer from C")]
unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Error> {
    if text.is_null() {
        return Err(invalid(&format!("{what} is NULL")));
    }
    // SAFETY: not NULL; the rest by contract.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| invalid(&format!("{what} is no UTF-8: {}", text.to_string_lossy())))
}

/// # Safety
/// NULL, or valid for so many bytes of which nobody else knows for as long as the result is used.
#[allow(unsafe_code, reason = "a buffer from C")]
unsafe fn buffer<'a>(out: *mut c_void, bytes: usize) -> Result<&'a mut [u8], Error> {
    match (out.is_null(), isize::try_from(bytes)) {
        (_, Ok(0)) => Ok(&mut []),
        (true, _) => Err(invalid("out is NULL")),
        (_, Err(_)) => Err(invalid("out_bytes is larger than any buffer")),
        (false, Ok(_)) => {
            // What is in it need not be initialised by whoever gives it.
            // SAFETY: valid for so many bytes by contract.
            unsafe { std::ptr::write_bytes(out.cast::<u8>(), 0, bytes) };
            // SAFETY: as above, and initialised.
            Ok(unsafe { std::slice::from_raw_parts_mut(out.cast(), bytes) })
        }
    }
}

/// # Safety
/// NULL, or valid for a tensor.
#[allow(unsafe_code, reason = "a pointer from C")]
unsafe fn put(out: *mut LlmpressTensor, tensor: LlmpressTensor) -> Result<(), Error> {
    if out.is_null() {
        return Err(invalid("out is NULL"));
    }
    // SAFETY: not NULL, and valid for a tensor by contract.
    unsafe { out.write(tensor) };
    Ok(())
}
