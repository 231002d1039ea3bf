//! All tests of this crate but those that measure their own process: one program is linked once, and runs them side by side.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../support/abq.rs"]
mod abq;
#[path = "../support/finished.rs"]
mod finished;
#[path = "../support/sparse.rs"]
mod sparse;
#[path = "../support/mod.rs"]
mod support;

mod batch;
mod gguf;
mod golden;
mod gpu;
mod gpu_abq;
mod gpu_cache;
mod gpu_sparse24;
mod hostile;
mod loaded;
mod quantised;
mod sparse24;
mod text;
mod transforms;
