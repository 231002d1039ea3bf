//! The fields of a BF16 word.
//!
//! ```text
//! bit 15  | 14 ... 7 | 6 ... 0
//! sign    | exponent | mantissa
//! ```

/// The exponent field.
#[inline]
#[must_use]
pub const fn exponent(word: u16) -> u8 {
    (word >> 7) as u8
}

/// Sign and mantissa in one byte: `sign << 7 | mantissa`.
#[inline]
#[must_use]
pub const fn sign_mantissa(word: u16) -> u8 {
    ((word >> 8) & 0x80 | word & 0x7f) as u8
}

/// The word with these fields.
#[inline]
#[must_use]
pub const fn join(exponent: u8, sign_mantissa: u8) -> u16 {
    let sm = sign_mantissa as u16;
    (sm & 0x80) << 8 | (exponent as u16) << 7 | sm & 0x7f
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_splits_and_joins() {
        for word in 0..=u16::MAX {
            assert_eq!(join(exponent(word), sign_mantissa(word)), word);
        }
        assert_eq!((exponent(0xbf80), sign_mantissa(0xbf81)), (127, 0x81));
    }
}
