//! Codes of a few bits, one after the other in little-endian words: a code may begin in one word and end in the next.

/// Words that `count` codes take.
pub fn words(count: u64, bits: u8) -> Option<u64> {
    Some(count.checked_mul(u64::from(bits))?.div_ceil(32))
}

/// Code `index` of the stream whose words `word` gives; 0 past its end.
pub(super) fn code(index: u64, bits: u8, word: impl Fn(u64) -> Option<u32>) -> u8 {
    let bit = index * u64::from(bits);
    let (at, shift) = (bit / 32, (bit % 32) as u32);
    let low = u64::from(word(at).unwrap_or(0));
    let high = if shift + u32::from(bits) > 32 { u64::from(word(at + 1).unwrap_or(0)) } else { 0 };
    (((low | high << 32) >> shift) & ((1 << bits) - 1)) as u8
}

/// The codes of a row of words.
pub(super) fn unpack(row: &[u32], bits: u8, out: &mut [u8]) {
    for (index, out) in out.iter_mut().enumerate() {
        *out = code(index as u64, bits, |at| row.get(at as usize).copied());
    }
}

/// Packs a row of codes.
pub fn pack(codes: &[u8], bits: u8, out: &mut [u32]) {
    out.fill(0);
    for (index, &value) in codes.iter().enumerate() {
        let bit = index * usize::from(bits);
        let wide = (u64::from(value) & ((1 << bits) - 1)) << (bit % 32);
        if let Some(word) = out.get_mut(bit / 32) {
            *word |= wide as u32;
        }
        if wide >> 32 != 0
            && let Some(word) = out.get_mut(bit / 32 + 1)
        {
            *word |= (wide >> 32) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_come_out_as_they_went_in(bits in 1u8..=8, codes in prop::collection::vec(any::<u8>(), 0..100)) {
            let codes: Vec<u8> = codes.iter().map(|c| c & (((1u16 << bits) - 1) as u8)).collect();
            let mut row = vec![u32::MAX; words(codes.len() as u64, bits).unwrap() as usize];
            pack(&codes, bits, &mut row);
            let mut back = vec![9; codes.len()];
            unpack(&row, bits, &mut back);
            prop_assert_eq!(back, codes);
        }
    }

    #[test]
    fn a_code_may_cross_words_as_compressed_tensors_packs_it() {
        // Eleven codes of three bits: the last begins at bit 30 with its two low bits.
        let codes = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0b101];
        let mut row = [0; 2];
        pack(&codes, 3, &mut row);
        assert_eq!(row[0] >> 30, 0b01);
        assert_eq!(row[1], 0b1);
    }
}
