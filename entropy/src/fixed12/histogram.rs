//! Which window of 16 exponents loses the fewest weights.

use super::{MAX_BASE, MIN_BASE};

/// The nine bits of a BF16 word above its mantissa.
const SIGN_EXPONENTS: usize = 512;
/// Tables counted side by side: neighbouring weights often share an exponent, and one table would wait
/// for its own last store.
const TABLES: usize = 8;
/// Below this many words, zeroing and folding the tables costs more than it saves.
const SHORT: usize = 4096;

/// Counts of `exponent - sign` over BF16 words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// By `sign << 8 | exponent`.
    counts: [u64; SIGN_EXPONENTS],
}

/// A choice of base and what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The `exponent - sign` that code 0 stands for.
    pub base: i16,
    /// How many weights lie outside of the window.
    pub escapes: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// A histogram of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: [0; SIGN_EXPONENTS] }
    }

    /// Counts `words`.
    pub fn add(&mut self, words: &[u16]) {
        // 2^30 words at most between folds keep the 32-bit counters from wrapping.
        for piece in words.chunks(1 << 30) {
            self.add_piece(piece);
        }
    }

    fn add_piece(&mut self, words: &[u16]) {
        let grouped = if words.len() < SHORT { 0 } else { words.len() / TABLES * TABLES };
        let (grouped, tail) = words.split_at(grouped);
        if !grouped.is_empty() {
            // Two places at a time: the processor's prefetch starts anew at each page, and waits for one page
            // while the other one flows.
            let (front, back) = grouped.split_at(grouped.len() / 2);
            let mut tables = [[0_u32; SIGN_EXPONENTS]; TABLES];
            let (of_front, of_back) = tables.split_at_mut(TABLES / 2);
            let fronts = front.as_chunks::<{ TABLES / 2 }>().0;
            let backs = back.as_chunks::<{ TABLES / 2 }>().0;
            for (front, back) in fronts.iter().zip(backs) {
                for (table, word) in of_front.iter_mut().zip(front) {
                    table[usize::from(word >> 7)] += 1;
                }
                for (table, word) in of_back.iter_mut().zip(back) {
                    table[usize::from(word >> 7)] += 1;
                }
            }
            for table in &tables {
                for (count, &n) in self.counts.iter_mut().zip(table) {
                    *count += u64::from(n);
                }
            }
        }
        for word in tail {
            self.counts[usize::from(word >> 7)] += 1;
        }
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (count, n) in self.counts.iter_mut().zip(&other.counts) {
            *count += n;
        }
    }

    /// How many words were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The base with the fewest escapes; of several, the lowest.
    #[must_use]
    pub fn best_window(&self) -> Window {
        let total = self.total();
        let mut best = Window { base: MIN_BASE, escapes: u64::MAX };
        for base in MIN_BASE..=MAX_BASE {
            // base >= 0, and base + 16 <= 255: both slices lie inside their half of the table.
            let first = base.unsigned_abs() as usize;
            let positive = &self.counts[first..first + 16];
            let negative = &self.counts[256 + first + 1..256 + first + 17];
            let escapes = total - positive.iter().chain(negative).sum::<u64>();
            if escapes < best.escapes {
                best = Window { base, escapes };
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, word by word.
    fn escapes(words: &[u16], base: i16) -> u64 {
        let key = |w: u16| ((w >> 7) & 0xff) as i16 - (w >> 15) as i16;
        words.iter().filter(|&&w| !(base..base + 16).contains(&key(w))).count() as u64
    }

    fn best(words: &[u16]) -> Window {
        let mut histogram = Histogram::new();
        histogram.add(words);
        assert_eq!(histogram.total(), words.len() as u64);
        histogram.best_window()
    }

    #[test]
    fn window_is_the_lowest_with_fewest_escapes() {
        for words in [
            vec![],
            vec![0x3f80],
            vec![0xbf80; 5],
            vec![0x8000; 3],
            vec![0x7f80, 0xff80, 0x7fff],
            (0..=u16::MAX).collect(),
            (0..9000_u16).map(|i| 0x3c00 ^ i.wrapping_mul(40503) & 0x87ff).collect(),
        ] {
            let window = best(&words);
            let all: Vec<_> = (MIN_BASE..=MAX_BASE).map(|base| escapes(&words, base)).collect();
            let fewest = all.iter().min().copied().unwrap();
            assert_eq!(window.escapes, fewest);
            assert_eq!(window.base, all.iter().position(|&e| e == fewest).unwrap() as i16);
        }
    }

    #[test]
    fn merged_pieces_equal_the_whole() {
        let words: Vec<u16> = (0..20_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 16) as u16).collect();
        let mut whole = Histogram::new();
        whole.add(&words);
        let mut pieces = Histogram::new();
        for piece in words.chunks(4999) {
            let mut one = Histogram::new();
            one.add(piece);
            pieces.merge(&one);
        }
        assert_eq!(whole, pieces);
    }
}
