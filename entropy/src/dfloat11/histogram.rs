//! Counts of exponents.

use crate::bf16::exponent;

/// How often each exponent occurs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    counts: Box<[u64; 256]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// Words counted before the 32-bit tables are added up.
    const BATCH: usize = 1 << 28;

    /// No exponent yet.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: Box::new([0; 256]) }
    }

    /// These counts.
    #[must_use]
    pub fn from_counts(counts: [u64; 256]) -> Self {
        Self { counts: Box::new(counts) }
    }

    /// Counts the exponents of `words`.
    pub fn add(&mut self, words: &[u16]) {
        for batch in words.chunks(Self::BATCH) {
            // Equal exponents in a row would wait for each other's store: eight tables take turns.
            let mut tables = [[0u32; 256]; 8];
            let mut groups = batch.chunks_exact(8);
            for group in &mut groups {
                for (table, &word) in tables.iter_mut().zip(group) {
                    table[usize::from(exponent(word))] += 1;
                }
            }
            for &word in groups.remainder() {
                tables[0][usize::from(exponent(word))] += 1;
            }
            for table in &tables {
                for (sum, &count) in self.counts.iter_mut().zip(table) {
                    *sum += u64::from(count);
                }
            }
        }
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (sum, &count) in self.counts.iter_mut().zip(other.counts.iter()) {
            *sum += count;
        }
    }

    /// The counts by exponent.
    #[must_use]
    pub fn counts(&self) -> &[u64; 256] {
        &self.counts
    }

    /// How many words were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum: u64, &n| sum.saturating_add(n))
    }

    /// Entropy in bits an exponent; 0 if nothing was counted.
    #[must_use]
    pub fn entropy_bits(&self) -> f64 {
        let total = self.total() as f64;
        let terms = self.counts.iter().filter(|&&c| c > 0).map(|&c| {
            let p = c as f64 / total;
            -p * p.log2()
        });
        terms.sum::<f64>().max(0.0)
    }
}
