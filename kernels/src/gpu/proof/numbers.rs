//! Numbers to prove kernels with, the same on every machine.

/// Numbers by chance, as kernels want them.
pub(super) struct Numbers(llmpress_numbers::Numbers);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(llmpress_numbers::Numbers::new(seed))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0.bits()
    }

    /// -1 .. 1.
    pub(super) fn float(&mut self) -> f32 {
        self.0.float()
    }

    /// `count` floats, `odd` in a thousand of them extremes.
    pub(super) fn floats(&mut self, count: usize, odd: u64) -> Vec<f32> {
        const ODD: [f32; 8] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 1e-40, -0.0, 0.0];
        (0..count)
            .map(|_| {
                let bits = self.next();
                if bits % 1000 < odd { ODD[(bits >> 20) as usize % ODD.len()] } else { 4.0 * self.float() }
            })
            .collect()
    }

    /// BF16 words like a model's weights, `odd` in a thousand of them zeros or larger than fixed12 has codes for.
    pub(super) fn weights(&mut self, count: usize, odd: u64) -> Vec<u16> {
        (0..count)
            .map(|_| {
                let bits = self.next();
                if bits >> 20 & 1023 < odd {
                    let large = ((128 + (bits >> 40 & 3)) << 7 | (bits >> 50 & 0x7f)) as u16;
                    return if bits >> 60 & 1 == 0 { 0 } else { large } | (bits >> 62 << 15) as u16;
                }
                let sum: i64 = (0..4).map(|i| (bits >> (12 * i) & 0xfff) as i64 - 2048).sum();
                half::bf16::from_f32(sum as f32 / 60_000.0).to_bits()
            })
            .collect()
    }
}
