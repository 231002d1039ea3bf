//! The operations of a decoder, over plain and compressed weights.
//!
//! ```text
//! weights (f32, bf16, f16, fixed12)  x  activations (f32, features x tokens)  -->  f32
//! ```
//!
//! No function here starts a thread or allocates more than a few KiB: the caller splits the work.

pub mod cpu;
pub mod gpu;
