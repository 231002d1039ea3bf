//! All tests of this crate but those that measure their own process: one program is linked once, and runs them side by side.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod batch;
mod bench_gpu;
mod claims;
mod components;
mod convert;
mod described;
mod diff;
mod environment;
mod errors;
mod eval;
mod eval_tasks;
mod foreign;
mod gguf;
mod gpu;
mod hub;
mod learn;
mod mutations;
mod ownership;
mod printing;
mod prune;
mod quantise;
mod resume;
mod small_floats;
mod sources;
mod sparse24;
mod spread;
mod tamper;
mod templates;
mod transforms;
mod truncated;
mod version;
mod wide;
