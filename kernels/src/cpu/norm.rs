//! Root mean square norm (Zhang and Sennrich).

use super::isa::{Isa, multiversion};

/// Partial sums over a single token: feature `f` goes to sum `f % LANES`; then they are added in order.
const LANES: usize = 16;
/// Tokens whose sums are kept side by side.
const MOST: usize = super::PANEL;

/// `out[f, t] = x[f, t] / sqrt(mean over f of x[f, t]^2 + eps) * weight[f]` on a panel of `width` tokens and
/// `weight.len()` features.
///
/// Squares are added in ascending features by fused multiply-adds; of a single token in sixteen interleaved
/// sums, which are then added in order.
///
/// # Panics
/// Where `width` is not 1 to [`super::PANEL`], or `x` and `out` are not `weight.len()` x `width`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, width: usize, out: &mut [f32]) {
    rms_norm_with(Isa::detect(), x, weight, eps, width, out);
}

fn rms_norm_with(isa: Isa, x: &[f32], weight: &[f32], eps: f32, width: usize, out: &mut [f32]) {
    #[inline(always)]
    fn body(x: &[f32], weight: &[f32], eps: f32, width: usize, out: &mut [f32]) {
        let mut sums = [0.0f32; MOST];
        for x in x.chunks(if width == 1 { LANES } else { width }) {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = x.mul_add(*x, *sum);
            }
        }
        if width == 1 {
            sums[0] = sums[..LANES].iter().fold(0.0, |a, b| a + b);
        }
        for sum in &mut sums[..width] {
            *sum = 1.0 / (*sum / weight.len() as f32 + eps).sqrt();
        }
        if width == 1 {
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * sums[0] * weight;
            }
        } else {
            for ((out, x), weight) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(weight) {
                for ((out, x), scale) in out.iter_mut().zip(x).zip(&sums) {
                    *out = x * scale * weight;
                }
            }
        }
    }
    assert!((1..=MOST).contains(&width) && x.len() == weight.len() * width && out.len() == x.len());
    multiversion!(isa, body(x: &[f32], weight: &[f32], eps: f32, width: usize, out: &mut [f32]));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #[test]
        fn every_version_gives_the_same_bits_and_the_norm(features in 0usize..70, width in 1usize..=48, seed: u64) {
            let x = values(seed, features * width);
            let weight = values(seed ^ 1, features);
            let mut expected = vec![0.0; x.len()];
            rms_norm_with(Isa::Portable, &x, &weight, 1e-5, width, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![0.0; x.len()];
                rms_norm_with(isa, &x, &weight, 1e-5, width, &mut out);
                prop_assert!(same_bits(&out, &expected), "{isa:?}");
            }
            for t in 0..width {
                let column: Vec<f64> = x.iter().skip(t).step_by(width).map(|&x| f64::from(x)).collect();
                let mean = column.iter().map(|x| x * x).sum::<f64>() / features as f64;
                if !mean.is_finite() || mean > 1e30 {
                    continue;
                }
                for (f, x) in column.iter().enumerate() {
                    let exact = x / (mean + 1e-5).sqrt() * f64::from(weight[f]);
                    let found = f64::from(expected[f * width + t]);
                    let fits = (exact - found).abs() <= 1e-5 * exact.abs().max(1e-30) || found == exact as f32 as f64;
                    prop_assert!(fits || !exact.is_finite() || exact.abs() > 1e38, "{exact} {found}");
                }
            }
        }
    }
}
