//! Sizes of a unit's components, known once its histogram is.

use super::{BLOCK_BYTES, BLOCK_GAP_BYTES, Code, Histogram, Unrepresentable};

/// Most symbols of a block: the official decoder stages a block's words in 48 KiB of shared memory
/// beside 512 counters of 4 bytes and 4 bytes more.
pub const MAX_BLOCK_SYMBOLS: u64 = (48 * 1024 - 4 * 512 - 4) / 2;

/// The sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Weights.
    pub elements: u64,
    /// Bits of all codes.
    pub bits: u64,
    /// Bytes of the stream.
    pub encoded_exponent_bytes: u64,
    /// Blocks of the stream.
    pub blocks: u64,
}

impl Layout {
    /// The layout of a unit with this histogram.
    pub fn new(code: &Code, histogram: &Histogram) -> Result<Self, Unrepresentable> {
        let elements = histogram.total();
        if elements == 0 {
            return Err(Unrepresentable::Empty);
        }
        if elements > u64::from(u32::MAX) {
            return Err(Unrepresentable::Elements(elements));
        }
        let bits = code.encoded_bits(histogram);
        let bytes = bits.div_ceil(8);
        if bytes > i32::MAX as u64 {
            return Err(Unrepresentable::StreamBytes(bytes));
        }
        Ok(Self { elements, bits, encoded_exponent_bytes: bytes, blocks: bytes.div_ceil(BLOCK_BYTES as u64) })
    }

    /// Bytes of `gaps`.
    #[must_use]
    pub fn gaps_bytes(&self) -> u64 {
        self.blocks * BLOCK_GAP_BYTES as u64
    }

    /// Bytes of `output_positions`.
    #[must_use]
    pub fn output_positions_bytes(&self) -> u64 {
        4 * (self.blocks + 1)
    }
}
