//! All tests of this crate but those that measure their own process: one program is linked once, and runs them side by side.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod archive;
mod dfloat11;
mod dfloat8;
mod fixed12;
mod golden;
mod planes;
