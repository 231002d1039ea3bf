//! Look-up tables for decoding: several symbols at a time, and one of any length.

use super::word::{CodeWord, left_justified};

/// Bits of the multi-symbol look-up: its table of 32 KiB stays in the first-level cache.
pub(super) const LOOKUP_BITS: u32 = 12;
/// Symbols of one look-up at most.
pub(super) const LOOKUP_SYMBOLS: usize = 5;

/// Look-up tables of a code.
#[derive(Clone)]
pub(super) struct Tables {
    /// By the next 12 bits: symbols in bits 0..40 (first lowest), their number in 40..43, their bits in
    /// 44..48, and at 48 + i whether a symbol starts i bits on. Zero: the code is longer, or unused.
    pub(super) lookup: Box<[u64; 1 << LOOKUP_BITS]>,
    /// Codes left-justified, ascending, with length and symbol.
    sorted: Vec<(u32, u8, u8)>,
}

impl Tables {
    pub(super) fn new(words: &[CodeWord; 256]) -> Self {
        let mut sorted: Vec<(u32, u8, u8)> = words
            .iter()
            .enumerate()
            .filter(|(_, w)| w.length > 0)
            .map(|(symbol, w)| (left_justified(*w), w.length as u8, symbol as u8))
            .collect();
        sorted.sort_unstable();
        // One symbol by the next 12 bits, as length << 8 | symbol; 0 where no code of at most 12 bits fits.
        let mut single = vec![0u16; 1 << LOOKUP_BITS];
        for &(code, length, symbol) in &sorted {
            if u32::from(length) <= LOOKUP_BITS {
                let first = (code >> (32 - LOOKUP_BITS)) as usize;
                let count = 1usize << (LOOKUP_BITS - u32::from(length));
                single[first..first + count].fill(u16::from(length) << 8 | u16::from(symbol));
            }
        }
        let mut tables = Self { lookup: Box::new([0; 1 << LOOKUP_BITS]), sorted };
        for (index, slot) in tables.lookup.iter_mut().enumerate() {
            let (mut entry, mut count, mut used) = (0u64, 0usize, 0u32);
            while count < LOOKUP_SYMBOLS && used < LOOKUP_BITS {
                let found = single[(index << used) & ((1 << LOOKUP_BITS) - 1)];
                let length = u32::from(found >> 8);
                // Only codes that lie wholly within the known bits are sure.
                if length == 0 || used + length > LOOKUP_BITS {
                    break;
                }
                entry |= u64::from(found & 0xff) << (8 * count) | 1 << (48 + used);
                used += length;
                count += 1;
            }
            if count > 0 {
                *slot = entry | (count as u64) << 40 | u64::from(used) << 44;
            }
        }
        tables
    }

    /// The symbol whose code starts the 32 bits, and its length.
    #[inline]
    pub(super) fn symbol(&self, bits: u32) -> Option<(u8, u32)> {
        let after = self.sorted.partition_point(|&(code, ..)| code <= bits);
        let &(code, length, symbol) = self.sorted.get(after.checked_sub(1)?)?;
        let length = u32::from(length);
        ((bits ^ code) >> (32 - length) == 0).then_some((symbol, length))
    }
}
