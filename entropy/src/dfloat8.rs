//! dfloat8: FP8 weights (E4M3) in DFloat11's stream.
//!
//! ```text
//! byte = sign | exponent, 4 bits | mantissa, 3 bits          as a word: sign at bit 15, exponent from 7 on, mantissa lowest
//! encoded_exponent, output_positions, gaps, luts             as in dfloat11, of exponents below 16
//! sign_mantissa                                              half a byte a weight, the first of two in the lower half
//! ```
//!
//! [`widen`] makes words that [`dfloat11`](crate::dfloat11) encodes and decodes, [`pack`] halves what it keeps of their signs and mantissas.

use crate::dfloat11::{Code, EncodedUnit, Unrepresentable, encode as encode_words};

/// Exponents that there are.
pub const EXPONENTS: usize = 16;

/// The words of bytes.
pub fn widen(bytes: &[u8], words: &mut Vec<u16>) {
    words.clear();
    words.extend(bytes.iter().map(|&byte| {
        let word = u16::from(byte);
        (word & 0x80) << 8 | (word & 0x78) << 4 | word & 7
    }));
}

/// The inverse of [`widen`]. Bits that such words do not have are dropped.
pub fn narrow(words: &[u16], bytes: &mut [u8]) {
    for (byte, &word) in bytes.iter_mut().zip(words) {
        *byte = (word >> 8 & 0x80 | word >> 4 & 0x78 | word & 7) as u8;
    }
}

/// Half bytes of a sign and three bits of mantissa, two a byte, at the end of `out`; a last one alone has zeros beside it.
pub fn pack(sign_mantissa: &[u8], out: &mut Vec<u8>) {
    let half = |byte: u8| byte >> 4 & 8 | byte & 7;
    out.extend(sign_mantissa.chunks(2).map(|pair| match *pair {
        [low, high] => half(low) | half(high) << 4,
        _ => pair.first().map_or(0, |low| half(*low)),
    }));
}

/// `count` bytes of sign and mantissa from the half byte `first` on. What is not there is zero.
pub fn unpack(halves: &[u8], first: usize, count: usize, out: &mut Vec<u8>) {
    let whole = |half: u8| (half & 8) << 4 | half & 7;
    out.clear();
    out.reserve(count + 2);
    let start = first / 2;
    let end = first.saturating_add(count).div_ceil(2).min(halves.len());
    for &byte in halves.get(start..end).unwrap_or_default() {
        out.extend([whole(byte & 15), whole(byte >> 4)]);
    }
    if first % 2 == 1 && !out.is_empty() {
        out.remove(0);
    }
    out.resize(count, 0);
}

/// Whether a code is one of such exponents.
#[must_use]
pub fn fits(code: &Code) -> bool {
    code.lengths().iter().skip(EXPONENTS).all(|length| *length == 0)
}

/// Encodes a whole unit in memory; its `sign_mantissa` are halves.
///
/// # Errors
/// What DFloat11 cannot hold: no weights, or so few exponents that its tables have no first entry.
pub fn encode(bytes: &[u8]) -> Result<EncodedUnit, Unrepresentable> {
    let mut words = Vec::new();
    widen(bytes, &mut words);
    let unit = encode_words(&words)?;
    let mut sign_mantissa = Vec::with_capacity(bytes.len().div_ceil(2));
    pack(&unit.sign_mantissa, &mut sign_mantissa);
    Ok(EncodedUnit { sign_mantissa, ..unit })
}
