//! All tests of this crate but those that measure their own process: one program is linked once, and runs them side by side.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../../../model/tests/support/mod.rs"]
mod support;

mod fold;
mod grids;
mod kept;
mod learn;
mod learn_block;
mod run;
