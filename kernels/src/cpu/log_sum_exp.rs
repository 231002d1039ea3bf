//! What evaluation needs of logits, a run of the vocabulary at a time.
//!
//! ```text
//! log sum exp l = max + ln sum,   sum = total of e^(l - max)
//! ```
//!
//! The maximum grows from run to run; what was summed under a smaller one is scaled down.

use super::exp::exp_inline;
use super::isa::{Isa, multiversion};

/// Takes up `logits` (rows x `width`): `max[t]` and `sum[t]` start from minus infinity and 0. Every term is
/// the F32 [`super::exp`] of an F32 difference, added in F64, row after row.
///
/// # Panics
/// Where `logits` has no whole rows of `width`, or `max` or `sum` another length than `width`.
pub fn log_sum_exp(logits: &[f32], width: usize, max: &mut [f32], sum: &mut [f64]) {
    #[inline(always)]
    fn body(logits: &[f32], width: usize, max: &mut [f32], sum: &mut [f64]) {
        raise(logits, width, max, &mut [&mut *sum]);
        for row in logits.chunks_exact(width) {
            for ((l, max), sum) in row.iter().zip(&*max).zip(&mut *sum) {
                *sum += f64::from(exp_inline(l - max));
            }
        }
    }
    assert!(logits.len().is_multiple_of(width) && max.len() == width && sum.len() == width);
    multiversion!(Isa::detect(), body(logits: &[f32], width: usize, max: &mut [f32], sum: &mut [f64]));
}

/// As [`log_sum_exp`] of `p`, and `weighted[t]`, from 0, takes up the total of `e^(p - max) (p - q)`: then
/// `KL(P || Q) = weighted / sum - (lse p - lse q)`.
///
/// # Panics
/// As [`log_sum_exp`], and where `q` or `weighted` have other lengths than `p` and `sum`.
pub fn divergence(
    p: &[f32],
    q: &[f32],
    width: usize,
    max: &mut [f32],
    sum: &mut [f64],
    weighted: &mut [f64],
) {
    #[inline(always)]
    fn body(p: &[f32], q: &[f32], width: usize, max: &mut [f32], sum: &mut [f64], weighted: &mut [f64]) {
        raise(p, width, max, &mut [&mut *sum, &mut *weighted]);
        for (p, q) in p.chunks_exact(width).zip(q.chunks_exact(width)) {
            for ((((p, q), max), sum), weighted) in
                p.iter().zip(q).zip(&*max).zip(&mut *sum).zip(&mut *weighted)
            {
                let e = f64::from(exp_inline(p - max));
                *sum += e;
                // A logit of minus infinity has no share, whatever the other model says.
                let term = e * (f64::from(*p) - f64::from(*q));
                *weighted += if e > 0.0 { term } else { 0.0 };
            }
        }
    }
    assert!(p.len().is_multiple_of(width) && p.len() == q.len());
    assert!(max.len() == width && sum.len() == width && weighted.len() == width);
    multiversion!(
        Isa::detect(),
        body(p: &[f32], q: &[f32], width: usize, max: &mut [f32], sum: &mut [f64], weighted: &mut [f64])
    );
}

/// Raises the maxima to those of `logits` and scales the totals accordingly.
#[inline(always)]
fn raise(logits: &[f32], width: usize, max: &mut [f32], totals: &mut [&mut [f64]]) {
    let mut raised = max.to_vec();
    for row in logits.chunks_exact(width) {
        for (max, l) in raised.iter_mut().zip(row) {
            *max = max.max(*l);
        }
    }
    for (token, (max, raised)) in max.iter_mut().zip(raised).enumerate() {
        if raised > *max {
            let scale = f64::from(*max - raised).exp();
            totals.iter_mut().for_each(|t| t[token] *= scale);
            *max = raised;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_add_up_to_the_whole(rows in prop::collection::vec((-80.0f32..80.0, -9.0f32..9.0), 1..60), cut in 0usize..60, width in 1usize..4) {
            let rows: Vec<_> = rows.iter().copied().cycle().take(rows.len().next_multiple_of(width)).collect();
            let (p, q): (Vec<f32>, Vec<f32>) = rows.iter().map(|(a, d)| (*a, a + d)).unzip();
            let cut = (cut * width).min(p.len());
            let (mut max, mut sum, mut weighted) = (vec![f32::NEG_INFINITY; width], vec![0.0; width], vec![0.0; width]);
            let (mut q_max, mut q_sum) = (max.clone(), sum.clone());
            for range in [0..cut, cut..p.len()] {
                divergence(&p[range.clone()], &q[range.clone()], width, &mut max, &mut sum, &mut weighted);
                log_sum_exp(&q[range], width, &mut q_max, &mut q_sum);
            }
            for t in 0..width {
                let column = |x: &[f32]| x.iter().skip(t).step_by(width).map(|&x| f64::from(x)).collect::<Vec<_>>();
                let (p, q) = (column(&p), column(&q));
                let lse = |x: &[f64]| { let m = x.iter().copied().fold(f64::MIN, f64::max); m + x.iter().map(|x| (x - m).exp()).sum::<f64>().ln() };
                let (lp, lq) = (lse(&p), lse(&q));
                prop_assert!((f64::from(max[t]) + sum[t].ln() - lp).abs() < 1e-5);
                prop_assert!((f64::from(q_max[t]) + q_sum[t].ln() - lq).abs() < 1e-5);
                let kl: f64 = p.iter().zip(&q).map(|(p, q)| (p - lp).exp() * ((p - lp) - (q - lq))).sum();
                let found = weighted[t] / sum[t] - (f64::from(max[t]) + sum[t].ln() - f64::from(q_max[t]) - q_sum[t].ln());
                prop_assert!((found - kl).abs() < 1e-4, "{found} {kl}");
            }
        }
    }
}
