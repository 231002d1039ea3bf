//! `dfloat8`: FP8 weights (E4M3), one Huffman code for the exponents of a tensor, in DFloat11's stream.
//!
//! ```text
//! <tensor>.luts               U8  [R + 1, 256]   decoding tables, then the code length of each exponent
//! <tensor>.encoded_exponent   U8  [B]            the bit stream
//! <tensor>.sign_mantissa      U8  [ceil(N / 2)]  half a byte a weight, the first of two in the lower half
//! <tensor>.output_positions   U8  [4 (nb + 1)]   u32 number of the first symbol of each 4096-byte block, then N
//! <tensor>.gaps               U8  [320 nb]       5 bits per 8-byte window: where its first code starts
//! ```

use llmpress_entropy::dfloat8::narrow;
use llmpress_entropy::dfloat11::Layout;

use super::dfloat11::{self, ENCODED_EXPONENT, GAPS, LUTS, OUTPUT_POSITIONS, SIGN_MANTISSA};
use super::{ComponentSet, ComponentSpec, Part, single};
use crate::{Dtype, Error, Result};

/// All components.
pub const COMPONENTS: [&str; 5] = [LUTS, ENCODED_EXPONENT, SIGN_MANTISSA, OUTPUT_POSITIONS, GAPS];

/// Weights that are decoded at a time.
const STEP: usize = 1 << 18;

/// The components of a tensor.
pub fn components(layout: &Layout, luts_bytes: u64) -> Vec<ComponentSpec> {
    let u8s = |name, shape| ComponentSpec { name, dtype: Dtype::U8, shape };
    vec![
        u8s(LUTS, vec![luts_bytes / 256, 256]),
        u8s(ENCODED_EXPONENT, vec![layout.encoded_exponent_bytes]),
        u8s(SIGN_MANTISSA, vec![layout.elements.div_ceil(2)]),
        u8s(OUTPUT_POSITIONS, vec![layout.output_positions_bytes()]),
        u8s(GAPS, vec![layout.gaps_bytes()]),
    ]
}

#[derive(Debug)]
pub(super) struct Reader(dfloat11::Reader);

impl Reader {
    pub(super) fn open(set: ComponentSet<'_>, parts: &[Part]) -> Result<Self> {
        let part = single(&set, parts)?;
        if part.dtype != Dtype::F8_E4M3 {
            return Err(Error::Invalid(format!(
                "unit {}: tensor {} is {}, but the encoding holds F8_E4M3 only",
                set.unit(),
                part.name,
                part.dtype.name()
            )));
        }
        dfloat11::Reader::of(&set, part.bytes, true).map(Self)
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut words = vec![0u16; out.len().min(STEP)];
        let mut first = offset;
        for piece in out.chunks_mut(STEP) {
            let words = words.get_mut(..piece.len()).unwrap_or_default();
            self.0.read(first, words)?;
            narrow(words, piece);
            first += piece.len() as u64;
        }
        Ok(())
    }
}
