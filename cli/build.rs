//! Tells the program which git revision it is built from, where that is known.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=LLMPRESS_REVISION");
    // Without these cargo would run this again for every change in the package.
    for path in ["../.git/HEAD", "../.git/logs/HEAD"] {
        if std::path::Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    if std::env::var_os("LLMPRESS_REVISION").is_some() {
        return;
    }
    let output = Command::new("git").args(["rev-parse", "HEAD"]).output();
    if let Ok(output) = output
        && output.status.success()
        && let Ok(revision) = String::from_utf8(output.stdout)
    {
        println!("cargo:rustc-env=LLMPRESS_REVISION={}", revision.trim());
    }
}
