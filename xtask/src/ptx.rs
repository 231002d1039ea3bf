//! The PTX of the kernels: made, or made again and compared.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::nvrtc::{NEWER, Nvrtc, SHIPPED};

/// What the shipped PTX is made for: it runs on this architecture and all later ones.
const SHIPPED_ARCHITECTURE: &str = "compute_80";
/// What the kernels of a step are made for a second time, with [`STEP`] defined: their launches overlap there.
const STEP_ARCHITECTURE: &str = "compute_90";
/// Of device.cuh.
const STEP: &str = "LLMPRESS_STEP";
/// Sources without kernels of a step.
const NO_STEP: [&str; 2] = ["abq_decoded.cu", "ceiling.cu"];
/// Architectures that the sources must compile for besides.
const CHECKED: [&str; 2] = ["sm_89", "sm_90a"];
/// The same, for the newer compiler.
const CHECKED_NEWER: [&str; 1] = ["sm_100"];

/// The texts of a directory by name: `.cu` and `.cuh`.
struct Sources {
    kernels: Vec<(String, String)>,
    headers: Vec<(String, String)>,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn sources() -> Result<Sources, String> {
    let dir = root().join("kernels/cuda");
    let mut sources = Sources { kernels: Vec::new(), headers: Vec::new() };
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&dir).map_err(|e| format!("kernels/cuda: {e}"))?.flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).map_err(|e| format!("kernels/cuda/{name}: {e}"))?;
        match path.extension().and_then(|e| e.to_str()) {
            Some("cu") => sources.kernels.push((name, text)),
            Some("cuh") => sources.headers.push((name, text)),
            _ => return Err(format!("kernels/cuda/{name} is neither .cu nor .cuh")),
        }
    }
    Ok(sources)
}

/// File names and texts of the PTX of all sources.
fn shipped(sources: &Sources) -> Result<Vec<(String, String)>, String> {
    let compiler = Nvrtc::open(SHIPPED, &target())?;
    let mut made = Vec::new();
    for (name, text) in &sources.kernels {
        let ptx = compiler.compile(name, text, &sources.headers, SHIPPED_ARCHITECTURE, None)?;
        made.push((name.replace(".cu", ".ptx"), ptx));
        if !NO_STEP.contains(&name.as_str()) {
            let ptx = compiler.compile(name, text, &sources.headers, STEP_ARCHITECTURE, Some(STEP))?;
            made.push((name.replace(".cu", ".sm_90.ptx"), ptx));
        }
    }
    Ok(made)
}

/// `cargo xtask ptx`.
pub(crate) fn write() -> Result<(), String> {
    let dir = root().join("kernels/ptx");
    let made = shipped(&sources()?)?;
    fs::create_dir_all(&dir).map_err(|e| format!("kernels/ptx: {e}"))?;
    for name in present(&dir)? {
        if !made.iter().any(|(made, _)| *made == name) {
            fs::remove_file(dir.join(&name)).map_err(|e| format!("kernels/ptx/{name}: {e}"))?;
        }
    }
    for (name, text) in &made {
        fs::write(dir.join(name), text).map_err(|e| format!("kernels/ptx/{name}: {e}"))?;
    }
    println!("{} files in kernels/ptx, by NVRTC {}", made.len(), SHIPPED.version);
    Ok(())
}

/// `cargo xtask ptx --check`.
pub(crate) fn check() -> Result<(), String> {
    let dir = root().join("kernels/ptx");
    let sources = sources()?;
    let made = shipped(&sources)?;
    let mut stale: Vec<String> = Vec::new();
    for (name, text) in &made {
        if fs::read_to_string(dir.join(name)).ok().as_ref() != Some(text) {
            stale.push(name.clone());
        }
    }
    stale.extend(present(&dir)?.into_iter().filter(|name| !made.iter().any(|(made, _)| made == name)));
    if !stale.is_empty() {
        return Err(format!(
            "not made from the sources as they are: {}; run cargo xtask ptx",
            stale.join(", ")
        ));
    }
    for (release, architectures) in [(SHIPPED, &CHECKED[..]), (NEWER, &CHECKED_NEWER[..])] {
        let compiler = Nvrtc::open(release, &target())?;
        for (name, text) in &sources.kernels {
            for architecture in architectures {
                compiler.compile(name, text, &sources.headers, architecture, None)?;
            }
        }
        println!(
            "{} sources compile for {} by NVRTC {}",
            sources.kernels.len(),
            architectures.join(", "),
            release.version
        );
    }
    println!("kernels/ptx is up to date");
    Ok(())
}

fn present(dir: &Path) -> Result<Vec<String>, String> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(format!("kernels/ptx: {e}")),
    }
}
