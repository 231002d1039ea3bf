//! Proofs that a converted checkpoint is what it should be.
//!
//! ```text
//! digests:    every byte of a converted directory is the one that was written, and decodes to the original
//! bit_exact:  every tensor of two checkpoints, word for word
//! ```

mod bit_exact;
mod digests;

pub use bit_exact::{Comparison, Difference, bit_exact};
pub use digests::{DigestReport, Fault, verify_digests};

/// Bytes read at a time by each thread.
const PIECE: usize = 2 << 20;
