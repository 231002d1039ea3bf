//! Compiles every CUDA source with the host's C++ compiler.
//!
//! The compiler's thread sanitizer marks each access to memory with a call; the emulator answers those calls itself,
//! so that it sees every access of unchanged sources.

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let (cuda, cpp, faults) = (root.join("../cuda"), root.join("cpp"), root.join("faults"));
    let mut sources = Vec::new();
    for dir in [&cuda, &faults] {
        println!("cargo:rerun-if-changed={}", dir.display());
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            println!("cargo:rerun-if-changed={}", path.display());
            if path.extension().is_some_and(|e| e == "cu") {
                sources.push(path);
            }
        }
    }
    println!("cargo:rerun-if-changed={}", cpp.display());
    sources.sort();

    let mut kernels = compiler(&cuda, &cpp);
    kernels.flag("-fsanitize=thread").flag("-fno-tree-vectorize").flag("-fno-tree-slp-vectorize");
    let mut table = String::from("#include \"registry.h\"\n");
    let mut files = String::new();
    for source in &sources {
        let stem = source.file_stem().and_then(|s| s.to_str()).ok_or("the name of a source is not UTF-8")?;
        let unit = out.join(format!("{stem}.cpp"));
        fs::write(&unit, registration(source, stem)?)?;
        kernels.file(unit);
        writeln!(table, "extern \"C\" const Kernel* llmpress_kernels_of_{stem}(unsigned* count);")?;
        writeln!(
            files,
            "    if (kernel_in(llmpress_kernels_of_{stem}, \"{stem}\", file, name, found)) return found;"
        )?;
    }
    kernels.compile("llmpress_emulated_kernels");

    writeln!(
        table,
        "const Kernel* find_kernel(const char* file, const char* name) {{\n    const Kernel* found = nullptr;\n{files}    return nullptr;\n}}"
    )?;
    let unit = out.join("find_kernel.cpp");
    fs::write(&unit, table)?;
    compiler(&cuda, &cpp).file(unit).file(cpp.join("emulator.cpp")).compile("llmpress_emulator_runtime");
    Ok(())
}

fn compiler(cuda: &Path, cpp: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).include(cuda).include(cpp);
    // Contraction would change bits; jumps between stacks are what the fortified longjmp refuses.
    for flag in ["-ffp-contract=off", "-fno-strict-aliasing", "-fno-exceptions", "-U_FORTIFY_SOURCE", "-w"] {
        build.flag(flag);
    }
    build
}

/// A translation unit with a source and the table of its kernels.
fn registration(source: &Path, stem: &str) -> Result<String, Box<dyn Error>> {
    let text = fs::read_to_string(source)?;
    let mut unit = String::from("#define LLMPRESS_EMULATOR\n");
    writeln!(unit, "#include \"{}\"", source.display())?;
    writeln!(unit, "#include \"registry.h\"")?;
    writeln!(unit, "static const Kernel kernels[] = {{")?;
    for name in kernel_names(&text) {
        writeln!(
            unit,
            "    {{\"{name}\", Thunk<&{name}>::call, Thunk<&{name}>::kinds, Thunk<&{name}>::count}},"
        )?;
    }
    writeln!(unit, "    {{nullptr, nullptr, nullptr, 0}}\n}};")?;
    writeln!(
        unit,
        "extern \"C\" const Kernel* llmpress_kernels_of_{stem}(unsigned* count) {{\n    *count = sizeof kernels / \
         sizeof kernels[0] - 1;\n    return kernels;\n}}"
    )?;
    Ok(unit)
}

/// The names after `extern "C" __global__ void`, also where a macro makes kernels: a line `KERNEL_NAME(name)` in a
/// comment names one.
fn kernel_names(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for piece in text.split("extern \"C\" __global__ void").skip(1) {
        let mut rest = piece.trim_start();
        if let Some(bounds) = rest.strip_prefix("__launch_bounds__") {
            rest = bounds.split_once(')').map_or("", |(_, rest)| rest).trim_start();
        }
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(0);
        let after = rest[end..].trim_start();
        if end > 0 && after.starts_with('(') {
            names.push(&rest[..end]);
        }
    }
    for line in text.lines() {
        if let Some(name) = line.trim().strip_prefix("// KERNEL_NAME(").and_then(|n| n.strip_suffix(')')) {
            names.push(name);
        }
    }
    names
}
