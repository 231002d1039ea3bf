//! All tests of this crate but those that measure their own process: one program is linked once, and runs them side by side.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod chain;
mod families;
mod quantise;
mod source;
mod sparse24;
mod sparse_golden;
mod sparsify;
mod train;
