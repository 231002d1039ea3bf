//! What the assembler makes of each kernel: registers, and what of them has to go to memory.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use crate::package::Release;
use crate::ptx::{root, target};

/// NVIDIA's assembler.
const PTXAS: Release = Release {
    package: "nvidia-cuda-nvcc-cu12",
    version: "12.9.86",
    sha256: "5d6a0d32fdc7ea39917c20065614ae93add6f577d840233237ff08e9a38f58f0",
};
/// What is assembled for.
const ARCHITECTURE: &str = "sm_90";
/// Registers of a multiprocessor of it, and threads that it holds at most.
const REGISTERS: u32 = 65_536;
const MOST_THREADS: u32 = 2048;

/// `cargo xtask ptx --report`: a line for each kernel.
pub(crate) fn report() -> Result<(), String> {
    let dir = PTXAS.unpacked(&target().join("ptxas"))?;
    let assembler = dir.join("nvidia/cuda_nvcc/bin/ptxas");
    executable(&assembler)?;
    println!(
        "{:<28} {:>9} {:>15} {:>15}   by ptxas {} for {ARCHITECTURE}",
        "kernel", "registers", "threads resident", "bytes spilled", PTXAS.version
    );
    let ptx = root().join("kernels/ptx");
    let mut files: Vec<_> =
        fs::read_dir(&ptx).map_err(|e| format!("kernels/ptx: {e}"))?.flatten().map(|e| e.path()).collect();
    files.sort();
    for file in files {
        let output = Command::new(&assembler)
            .arg("-v")
            .arg(format!("-arch={ARCHITECTURE}"))
            .arg(&file)
            .arg("-o")
            .arg(env::temp_dir().join(format!("llmpress-report-{}.cubin", std::process::id())))
            .output()
            .map_err(|e| format!("{}: {e}", assembler.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !output.status.success() {
            return Err(format!("{name}:\n{said}"));
        }
        println!("{name}");
        for kernel in said.split("Compiling entry function '").skip(1) {
            let name = kernel.split('\'').next().unwrap_or_default();
            let registers = number(kernel, "Used ", " registers").unwrap_or(0);
            let spilled = number(kernel, "bytes stack frame, ", " bytes spill stores").unwrap_or(0)
                + number(kernel, "bytes spill stores, ", " bytes spill loads").unwrap_or(0);
            // Registers are given out to warps, eight a lane at a time.
            let threads = (REGISTERS / registers.next_multiple_of(8).max(8)).min(MOST_THREADS) / 32 * 32;
            println!("  {name:<26} {registers:>9} {threads:>15} {spilled:>15}");
        }
    }
    let _ = fs::remove_file(env::temp_dir().join(format!("llmpress-report-{}.cubin", std::process::id())));
    Ok(())
}

/// The number between two texts.
fn number(text: &str, before: &str, after: &str) -> Option<u32> {
    let rest = &text[text.find(before)? + before.len()..];
    rest[..rest.find(after)?].trim().parse().ok()
}

/// Unpacked files are not executable.
fn executable(file: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
        .map_err(|e| format!("{}: {e}", file.display()))
}
