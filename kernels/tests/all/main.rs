//! All tests of this crate but those that measure their own process: one program is linked once, and runs them side by side.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../support/abq.rs"]
mod abq;

mod gpu_abq;
mod gpu_abq_integer;
mod gpu_cache_codes;
mod gpu_ceiling;
mod gpu_dfloat11;
mod gpu_experts;
mod gpu_ops;
mod gpu_picker;
mod gpu_product;
mod gpu_proof;
mod gpu_sampling;
mod gpu_sparse24;
