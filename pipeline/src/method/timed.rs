//! Encoding and decoding in memory, for whoever times it.
//!
//! ```text
//! Joined (tensors of a unit) --encode--> what the method keeps of it --decode--> the same bytes
//! ```

use crate::{Error, Result};

/// A unit in memory: matrices of one dtype, joined.
pub(crate) struct Joined {
    /// Aligned for every dtype.
    words: Vec<u64>,
    bytes: usize,
    /// Shape and size of each matrix, in order.
    pub(crate) matrices: Vec<(Vec<u64>, usize)>,
}

impl Joined {
    /// Zeros, to be filled.
    pub(crate) fn new(matrices: Vec<(Vec<u64>, usize)>) -> Self {
        let bytes = matrices.iter().map(|(_, bytes)| bytes).sum::<usize>();
        Self { words: vec![0; bytes.div_ceil(8)], bytes, matrices }
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    /// Its bytes, to be filled.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }

    /// The same as words of 16 bits.
    pub(crate) fn words(&self) -> &[u16] {
        &bytemuck::cast_slice(&self.words)[..self.bytes / 2]
    }
}

/// A method's coders with their buffers, which are kept from unit to unit as a converter keeps them: fresh memory would
/// be measured otherwise.
pub(crate) trait Timed {
    /// Encodes a unit; gives the size of what would be stored.
    fn encode(&mut self, unit: &Joined) -> Result<usize>;

    /// Decodes what was encoded last.
    fn decode(&mut self, out: &mut [u8]) -> Result<()>;
}

pub(crate) fn invalid(e: impl std::fmt::Display) -> Error {
    Error::Invalid(e.to_string())
}
