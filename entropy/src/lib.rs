//! Lossless coders for the tensors of language models.
//!
//! ```text
//! BF16 words --+-- dfloat11: 8-bit sign+mantissa, Huffman-coded exponents, entry points every 8 bytes
//!              +-- fixed12:  8-bit sign+mantissa, 4-bit exponent codes in tensor-core tiles, escapes
//! FP8 ------------- dfloat8:  4-bit sign+mantissa, exponents as in dfloat11
//! floats ---------- archive:  upper bits of magnitudes through rANS, by the scales of rows and columns
//! any bytes  ----- planes:   byte planes through zstd, in chunks
//! ```
//!
//! Slices in, slices out: no files, no threads, no global state but the switch [`use_portable_code_only`]. Each coder has
//! a scalar reference and a fast path that produces the same bytes.

pub mod archive;
pub mod bf16;
pub mod dfloat11;
pub mod dfloat8;
mod error;
pub mod fixed12;
mod isa;
pub mod planes;

pub use error::Error;
pub use isa::use_portable_code_only;

#[cfg(not(target_endian = "little"))]
compile_error!("llmpress stores little-endian words in place and supports little-endian targets only");
