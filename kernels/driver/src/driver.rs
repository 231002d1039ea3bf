//! The driver's functions, by what they are about. Names and types are those of `cuda.h`; a handle is a number.

#![allow(unsafe_code, non_snake_case)]

mod context;
mod device;
mod event;
mod graph;
mod launch;
mod memory;
mod module;
mod stream;

use crate::code::{Code, Outcome};

/// Gives a result back where the caller said.
///
/// # Safety
/// `to` is null or has room for a `T`.
unsafe fn give<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: as the caller promises.
    unsafe { to.write_unaligned(value) };
    Ok(())
}
