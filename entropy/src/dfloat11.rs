//! DFloat11: the published lossless format for BF16 weights (arXiv 2504.11651; package dfloat11 0.5.0).
//!
//! ```text
//! word = sign | exponent | mantissa
//! sign_mantissa     a byte a weight, as it is
//! encoded_exponent  one prefix code for the unit; | block of 4096 bytes | block | ...
//! output_positions  number of the first symbol that starts in each block
//! gaps              5 bits per window of 8 bytes: where its first code starts
//! luts              decoding tables of 256 entries and the code lengths
//! ```
//!
//! After the histogram every size is known, so a unit can be laid out first and encoded in pieces, in
//! parallel, each from its own [`Position`]; an [`Assembler`] joins them.

mod code;
mod decode;
mod encode;
mod histogram;
mod layout;
mod pairs;
mod reference;
mod tables;
mod word;

pub use code::{Code, Unrepresentable};
pub use decode::{Span, decode_span};
pub use encode::{Assembler, EncodedUnit, Piece, Position, Sections, encode, encode_piece};
pub use histogram::Histogram;
pub use layout::{Layout, MAX_BLOCK_SYMBOLS};
pub use reference::{decode_span_reference, encode_piece_reference, encode_reference};

/// Bytes of the stream that one thread of the official decoder owns.
pub const WINDOW_BYTES: usize = 8;
/// Windows of a block.
pub const BLOCK_WINDOWS: usize = 512;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = WINDOW_BYTES * BLOCK_WINDOWS;
/// Bytes of the gaps of a block.
pub const BLOCK_GAP_BYTES: usize = BLOCK_WINDOWS * 5 / 8;
/// Bits of a window.
const WINDOW_BITS: u64 = 64;
/// Bits of a block.
const BLOCK_BITS: usize = BLOCK_BYTES * 8;
