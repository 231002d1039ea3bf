//! Numbers by chance, the same on every machine and in every version: for tests, proofs and benchmarks. Where a user draws
//! (`generate --seed`) it is ChaCha's numbers that count.

/// Marsaglia's xorshift of 64 bits with shifts of 13, 7 and 17, multiplied at the end (Vigna's xorshift*).
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// Those of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // Never 0, which would stay.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One of the first `count` numbers; 0 where there are none.
    pub fn below(&mut self, count: usize) -> usize {
        // The high bits are the better ones.
        (self.bits() >> 32) as usize % count.max(1)
    }

    /// From 0 to 1, 1 left out: 24 bits.
    pub fn share(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// From -1 to 1, 1 left out: 24 bits.
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_same_for_good() {
        let mut numbers = Numbers::new(7);
        let first: Vec<u64> = (0..3).map(|_| numbers.bits()).collect();
        assert_eq!(first, FIRST);
        for seed in [0, 1, u64::MAX] {
            let mut numbers = Numbers::new(seed);
            let mut sum = 0.0;
            for _ in 0..10_000 {
                let (share, float) = (numbers.share(), numbers.float());
                assert!((0.0..1.0).contains(&share) && (-1.0..1.0).contains(&float) && numbers.below(3) < 3);
                sum += float;
            }
            assert!(sum.abs() < 300.0, "{sum}");
            assert_eq!(numbers.below(0), 0);
        }
    }

    const FIRST: [u64; 3] = [0x6af3_c722_0eac_ad72, 0x1025_c43a_1122_b563, 0x9fc4_cb93_ef29_359b];
}
