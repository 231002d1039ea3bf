//! The table for encoding: two codes at a time.

use super::word::CodeWord;

/// The codes of two exponents joined: `bits << 8 | length`.
#[derive(Clone)]
pub(super) struct Pairs(pub(super) Box<[u64]>);

/// Most bits of a joined pair.
const PAIR_BITS: u32 = 56;
/// Stands for a pair that has no code or a longer one: more than any eight words may take together.
const NO_PAIR: u64 = 255;

impl Pairs {
    /// By first exponent + 256 * second: the order in which two bytes are read as a word. Trained weights
    /// use some forty exponents, whose entries stay in the first-level cache.
    pub(super) fn new(words: &[CodeWord; 256]) -> Self {
        let mut table = vec![NO_PAIR; 1 << 16];
        let known = || words.iter().enumerate().filter(|(_, w)| w.length > 0);
        for (first, a) in known() {
            for (second, b) in known() {
                let length = a.length + b.length;
                if length <= PAIR_BITS {
                    let bits = u64::from(a.bits) << b.length | u64::from(b.bits);
                    table[second << 8 | first] = bits << 8 | u64::from(length);
                }
            }
        }
        Self(table.into_boxed_slice())
    }
}
