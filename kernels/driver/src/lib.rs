//! Stands in for the CUDA driver library (and for cuBLAS) in tests.
//!
//! ```text
//! cuda.rs --> cudarc --> dlopen("libcuda.so.1") = this library --> checks each call, puts work on its stream's queue
//!                                                                  a stream is waited for --> the emulator runs its queue
//! ```
//!
//! It has the driver's symbols that the GPU path calls, and is stricter than the driver: work that nobody waits for
//! never runs, a handle that is used wrongly is written down as a `fault` where the driver would crash or say nothing,
//! and what a context still holds when it ends is written down as a `leak`. [`SETTINGS`] chooses the GPU and what goes
//! wrong with it.
//!
//! The rules are those of the driver's documentation, written down anew; nothing was taken from a driver.

#![cfg(target_os = "linux")]

mod capture;
mod code;
mod cublas;
mod drain;
mod driver;
mod install;
mod log;
mod product;
mod ptx;
mod recording;
mod settings;
mod state;
mod things;
mod work;

pub use install::{CUBLAS_NAMES, DRIVER_NAMES, built, hide, install};
pub use settings::SETTINGS;
