//! Where the library is, and how it is put in place of the driver's.

use std::env;
use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The names that a driver is installed under.
pub const DRIVER_NAMES: &[&str] = &["libcuda.so", "libcuda.so.1"];
/// The names that cuBLAS is looked for by, the newest first.
pub const CUBLAS_NAMES: &[&str] = &["libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"];

/// What cargo made of this package, beside the test that asks.
///
/// # Errors
/// It is not there: the test's package does not depend on this one.
pub fn built() -> Result<PathBuf> {
    let test = env::current_exe()?;
    let name = concat!("lib", env!("CARGO_CRATE_NAME"), ".so");
    let beside = test.parent().into_iter().flat_map(|dir| [dir.join(name), dir.join("deps").join(name)]);
    beside.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("there is no {name} beside {}", test.display()))
    })
}

/// Has the dynamic loader find it in `dir` by these names. One library by several names is loaded once, so that cuBLAS
/// and the driver know of each other.
///
/// # Errors
/// It was not built; a name is taken.
pub fn install(dir: &Path, names: &[&str]) -> Result<()> {
    let library = built()?;
    names.iter().try_for_each(|name| symlink(&library, dir.join(name)))
}

/// Has the dynamic loader find nothing that can be loaded by these names, whatever is installed on the machine.
///
/// # Errors
/// A file cannot be written.
pub fn hide(dir: &Path, names: &[&str]) -> Result<()> {
    names.iter().try_for_each(|name| fs::write(dir.join(name), "not a library"))
}
