//! Inputs for tests that compare bits.

use llmpress_numbers::Numbers;

/// Values of all magnitudes, with zeros of both signs, infinities and NaN among them.
pub(super) fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut numbers = Numbers::new(seed);
    // One case in four has extreme values; the rest would drown in NaN otherwise.
    let extreme = seed.is_multiple_of(4);
    (0..count)
        .map(|_| {
            let r = numbers.bits();
            match r >> 56 {
                0 => 0.0,
                1 => -0.0,
                2 if extreme => f32::INFINITY,
                3 if extreme => f32::NEG_INFINITY,
                4 if extreme => f32::NAN,
                5 if extreme => f32::from_bits(r as u32),
                6 => f32::from_bits(r as u32 & 0x807f_ffff),
                7 => f32::from_bits(r as u32 & 0x9fff_ffff | 0x0800_0000),
                _ => (r as i32 as f32) / 2f32.powi(31),
            }
        })
        .collect()
}

/// Equal bit for bit, any NaN being as good as another.
pub(super) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}
