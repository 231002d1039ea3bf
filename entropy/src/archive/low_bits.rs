//! Sign and low bits: as they are, without the bits between them.
//!
//! ```text
//! word     s ........ llll      low + 1 bits of it, the sign above; low bits where there is no sign
//! bytes    8 elements in as many bytes, the first in the lowest bits; zeros at the end
//! ```

/// The bits of a word that are stored so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) low: u32,
    pub(super) sign: bool,
}

impl Stored {
    /// They, in their places.
    #[inline]
    pub(super) fn mask(self) -> u16 {
        (u16::from(self.sign) << 15) | self.below()
    }

    /// Those that are not the sign.
    #[inline]
    fn below(self) -> u16 {
        ((1u32 << self.low) - 1) as u16
    }

    /// How many there are: the bytes of eight elements.
    #[inline]
    pub(super) fn each(self) -> usize {
        self.low as usize + usize::from(self.sign)
    }

    /// Bytes of so many elements.
    #[inline]
    pub(super) fn bytes(self, elements: usize) -> usize {
        elements.div_ceil(8) * self.each()
    }

    /// Appends the bits of `words`.
    pub(super) fn pack(self, words: &[u16], out: &mut Vec<u8>) {
        let (each, below, sign) = (self.each(), self.below(), u64::from(self.sign));
        for group in words.chunks(8) {
            let four = |words: &[u16]| {
                words.iter().rev().fold(0u64, |bits, word| {
                    bits << each | u64::from(word & below) | (u64::from(word >> 15) & sign) << self.low
                })
            };
            let (first, second) = group.split_at(group.len().min(4));
            let bits = u128::from(four(first)) | u128::from(four(second)) << (4 * each);
            out.extend_from_slice(bits.to_le_bytes().get(..each).unwrap_or_default());
        }
    }

    /// Or-s them into `words`.
    pub(super) fn unpack(self, packed: &[u8], words: &mut [u16]) {
        let (each, below, sign) = (self.each(), self.below(), u16::from(self.sign));
        if each == 0 {
            return;
        }
        for (group, packed) in words.chunks_mut(8).zip(packed.chunks(each)) {
            let mut bytes = [0; 16];
            bytes.iter_mut().zip(packed).for_each(|(byte, packed)| *byte = *packed);
            let bits = u128::from_le_bytes(bytes);
            for (mut bits, words) in
                [bits as u64, (bits >> (4 * each)) as u64].into_iter().zip(group.chunks_mut(4))
            {
                for word in words {
                    *word |= bits as u16 & below | ((bits >> self.low) as u16 & sign) << 15;
                    bits >>= each;
                }
            }
        }
    }
}
