//! Tasks of the repository.
//!
//! ```text
//! cargo xtask ptx            makes kernels/ptx/*.ptx from kernels/cuda/*.cu
//! cargo xtask ptx --check    makes them elsewhere and compares; compiles for every architecture of the list
//! ```

mod nvrtc;
mod ptx;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ptx"] => ptx::write(),
        ["ptx", "--check"] => ptx::check(),
        _ => Err("usage: cargo xtask ptx [--check]".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
