//! Sign and low bits: as they are, without the bits between them.
//!
//! ```text
//! word     s ........ llll      low + 1 bits of it, the sign above
//! bytes    8 elements in low + 1 bytes, the first in the lowest bits; zeros at the end
//! ```

/// The bits of a word that are stored so.
#[inline]
pub(super) fn mask(low: u32) -> u16 {
    0x8000 | ((1u32 << low) - 1) as u16
}

/// Bytes of so many elements.
#[inline]
pub(super) fn bytes(low: u32, elements: usize) -> usize {
    elements.div_ceil(8) * (low as usize + 1)
}

/// Appends the bits of `words`.
pub(super) fn pack(low: u32, words: &[u16], out: &mut Vec<u8>) {
    let each = low as usize + 1;
    let below = ((1u32 << low) - 1) as u16;
    for group in words.chunks(8) {
        let four = |words: &[u16]| {
            words.iter().rev().fold(0u64, |bits, word| {
                bits << each | u64::from(word & below) | u64::from(word >> 15) << low
            })
        };
        let (first, second) = group.split_at(group.len().min(4));
        let bits = u128::from(four(first)) | u128::from(four(second)) << (4 * each);
        out.extend_from_slice(bits.to_le_bytes().get(..each).unwrap_or_default());
    }
}

/// Or-s them into `words`.
pub(super) fn unpack(low: u32, packed: &[u8], words: &mut [u16]) {
    let each = low as usize + 1;
    let below = ((1u32 << low) - 1) as u16;
    for (group, packed) in words.chunks_mut(8).zip(packed.chunks(each)) {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(packed).for_each(|(byte, packed)| *byte = *packed);
        let bits = u128::from_le_bytes(bytes);
        for (mut bits, words) in
            [bits as u64, (bits >> (4 * each)) as u64].into_iter().zip(group.chunks_mut(4))
        {
            for word in words {
                *word |= bits as u16 & below | ((bits >> low) as u16 & 1) << 15;
                bits >>= each;
            }
        }
    }
}
