//! All tests of this crate but those that measure their own process: one program is linked once, and runs them side by side.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../by_hand/mod.rs"]
mod by_hand;

mod abq;
mod archive;
mod dfloat8;
mod discovery;
mod foreign;
mod gguf;
mod golden;
mod lowrank;
mod requirements;
mod safetensors;
mod small_floats;
mod sparse24;
mod torch;
