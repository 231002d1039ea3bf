//! The kernels as PTX, which the driver compiles for the GPU it finds.
//!
//! `cargo xtask ptx` makes the files in `kernels/ptx` from `kernels/cuda`; continuous integration makes them again and
//! compares.

/// A source without `.cu`, and its PTX.
const MODULES: &[(&str, &str)] = &[];

/// The PTX of a source.
pub(super) fn module(file: &str) -> Option<&'static str> {
    MODULES.iter().find(|(name, _)| *name == file).map(|(_, text)| *text)
}

/// The sources that are built in.
#[must_use]
pub fn modules() -> Vec<&'static str> {
    MODULES.iter().map(|(name, _)| *name).collect()
}
