//! Tells the program what it is built for, and which git revision it is built from where that is known.

use std::path::Path;
use std::process::Command;

fn main() {
    let target = std::env::var("TARGET").unwrap_or_default();
    println!("cargo:rustc-env=LLMPRESS_TARGET={target}");
    println!("cargo:rerun-if-env-changed=LLMPRESS_REVISION");
    // Without this cargo would run this again for every change in the package.
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("LLMPRESS_REVISION").is_some() {
        return;
    }
    // A checkout of something else that the sources were unpacked into says nothing of them.
    let root = git(&["rev-parse", "--show-toplevel"]).and_then(|path| Path::new(&path).canonicalize().ok());
    if root.is_none() || root != Path::new("..").canonicalize().ok() {
        return;
    }
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    if let Some(revision) = git(&["rev-parse", "HEAD"]) {
        println!("cargo:rustc-env=LLMPRESS_REVISION={revision}");
    }
}

/// What git says, if it is there and has something to say.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
