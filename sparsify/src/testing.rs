//! Weights and second moments by chance, for tests.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_calibrate::{Extent, Moments};
use llmpress_model::Panels;

/// From -1 to 1.
pub(crate) fn noise(seed: usize, i: usize) -> f32 {
    let x = (i as u64 * 0x9E37_79B9 + seed as u64 * 0x85EB_CA6B + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    ((x ^ x >> 31) as u32 as f32) / (1u64 << 31) as f32 - 1.0
}

/// Features depend on each other, and `dead` of 31 are always zero.
pub(crate) fn moments(features: usize, tokens: usize, dead: usize) -> Moments {
    let mut x = Panels::zeros(features, tokens);
    for t in 0..tokens {
        let shared = noise(t, 9999);
        let of = |f: usize| (noise(t, f) + 0.7 * shared) * (0.2 + (f % 11) as f32);
        x.set_token(t, (0..features).map(|f| if f % 31 < dead { 0.0 } else { of(f) }));
    }
    let mut moments = Moments::new(features, Extent::Full).unwrap();
    moments.add(&x).unwrap();
    moments.close()
}
