//! Normally distributed BF16 words by a table of quantiles.

use half::bf16;

/// Random bits of a weight: the largest of a million is the largest there is.
const BITS: u32 = 20;
/// Weights of one draw of 64 bits.
const A_DRAW: u64 = 3;

/// Quantiles of a normal distribution, at the middle of each of 2^20 equal shares.
#[derive(Debug)]
pub(super) struct Quantiles(Vec<u16>);

impl Quantiles {
    pub(super) fn new(deviation: f32) -> Self {
        let count = 1u32 << BITS;
        let of = |i: u32| {
            let share = (f64::from(i) + 0.5) / f64::from(count);
            bf16::from_f64(quantile(share) * f64::from(deviation)).to_bits()
        };
        Self((0..count).map(of).collect())
    }
}

/// Fills `out` with the weights of a tensor from place `first` on.
pub(super) fn fill(quantiles: &Quantiles, tensor: u64, first: u64, out: &mut [u16]) {
    let mask = (1u64 << BITS) - 1;
    let seed = mix(tensor.wrapping_add(1));
    let mut draw = first / A_DRAW;
    let mut bits = mix(seed ^ draw) >> (u64::from(BITS) * (first % A_DRAW));
    let mut left = A_DRAW - first % A_DRAW;
    for word in out {
        if left == 0 {
            draw += 1;
            bits = mix(seed ^ draw);
            left = A_DRAW;
        }
        *word = quantiles.0.get((bits & mask) as usize).copied().unwrap_or(0);
        bits >>= BITS;
        left -= 1;
    }
}

/// SplitMix64: a number well mixed.
pub(super) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The normal distribution's quantile (P. J. Acklam's rational approximation; relative error 1.2e-9).
fn quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 6] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 5] = [
        7.784_695_709_041_462e-3,
        3.224_671_290_700_398e-1,
        2.445_134_137_142_996,
        3.754_408_661_907_416,
        1.0,
    ];
    const TAIL: f64 = 0.02425;
    let horner = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if p < TAIL {
        let q = (-2.0 * p.ln()).sqrt();
        horner(&C, q) / horner(&D, q)
    } else if p > 1.0 - TAIL {
        -quantile(1.0 - p)
    } else {
        let q = p - 0.5;
        horner(&A, q * q) * q / horner(&B, q * q)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        for (p, z) in [(0.5, 0.0), (0.975, 1.959_963_985), (0.001, -3.090_232_306), (0.841_344_746, 1.0)] {
            assert!((quantile(p) - z).abs() < 1e-8, "{p}: {}", quantile(p));
        }
        let table = Quantiles::new(0.02);
        let mut out = vec![0; 300_000];
        fill(&table, 3, 0, &mut out);
        let values: Vec<f64> = out.iter().map(|&w| bf16::from_bits(w).to_f64()).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let deviation = (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt();
        assert!(mean.abs() < 2e-4 && (deviation / 0.02 - 1.0).abs() < 0.01, "{mean} {deviation}");
    }

    #[test]
    fn a_weight_depends_on_its_place_alone() {
        let table = Quantiles::new(1.0);
        let mut whole = vec![0; 1000];
        fill(&table, 5, 0, &mut whole);
        for first in [1, 2, 3, 499, 998] {
            let mut piece = vec![0; 1000 - first];
            fill(&table, 5, first as u64, &mut piece);
            assert_eq!(piece, whole[first..], "{first}");
        }
        let mut other = vec![0; 1000];
        fill(&table, 6, 0, &mut other);
        assert_ne!(other, whole);
    }
}
