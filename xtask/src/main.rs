//! Tasks of the repository.
//!
//! ```text
//! cargo xtask ptx            makes kernels/ptx/*.ptx from kernels/cuda/*.cu
//! cargo xtask ptx --check    makes them elsewhere and compares; compiles for every architecture of the list
//! cargo xtask ptx --report   registers and spills of every kernel, by the assembler
//! ```

mod nvrtc;
mod package;
mod ptx;
mod report;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ptx"] => ptx::write(),
        ["ptx", "--check"] => ptx::check(),
        ["ptx", "--report"] => report::report(),
        _ => Err("usage: cargo xtask ptx [--check | --report]".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
