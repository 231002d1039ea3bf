//! The Jensen-Shannon divergence of distributions that logits give.
//!
//! ```text
//! JS = sum of (p + q) g(d),   d = |ln p - ln q|,   u = e^-d
//! g(d) = (ln 2 - ln(1 + u) - d u / (1 + u)) / 2        >= 0, so that nothing cancels between tokens
//!      = (h tanh h - ln cosh h) / 2                    by its series in h = d / 2, for small d
//! ```

use super::exp::exp_inline;
use super::isa::{Isa, multiversion};

/// Adds to `sum[t]`, row after row, the divergence in nats of the distributions of the logits `p` and `q` (rows x `width`), whose
/// [`super::log_sum_exp`] over all rows are `lse_p` and `lse_q`. Each term is of F32 and within 1e-5 of itself.
///
/// # Panics
/// Where `p` has no whole rows of `width`, `q` another length, or the others another length than `width`.
pub fn jensen_shannon(p: &[f32], q: &[f32], width: usize, lse_p: &[f64], lse_q: &[f64], sum: &mut [f64]) {
    #[inline(always)]
    fn body(p: &[f32], q: &[f32], width: usize, lse_p: &[f64], lse_q: &[f64], sum: &mut [f64]) {
        for (p, q) in p.chunks_exact(width).zip(q.chunks_exact(width)) {
            for ((((p, q), lse_p), lse_q), sum) in p.iter().zip(q).zip(lse_p).zip(lse_q).zip(&mut *sum) {
                *sum += f64::from(term(f64::from(*p) - lse_p, f64::from(*q) - lse_q));
            }
        }
    }
    assert!(p.len().is_multiple_of(width) && p.len() == q.len());
    assert!(lse_p.len() == width && lse_q.len() == width && sum.len() == width);
    multiversion!(
        Isa::detect(),
        body(p: &[f32], q: &[f32], width: usize, lse_p: &[f64], lse_q: &[f64], sum: &mut [f64])
    );
}

/// One token's share by the logarithms of its probabilities.
#[inline(always)]
fn term(ln_p: f64, ln_q: f64) -> f32 {
    // Beyond this a probability is 0 in F32; two infinities would have no difference.
    let (ln_p, ln_q) = (ln_p.max(-200.0), ln_q.max(-200.0));
    let d = (ln_p - ln_q).abs() as f32;
    let u = exp_inline(-d);
    let h = 0.5 * d;
    let square = h * h;
    let mut near = -7601.0 / 935_550.0;
    for coefficient in [31.0 / 1575.0, -17.0 / 360.0, 1.0 / 9.0, -0.25, 0.5] {
        near = square.mul_add(near, coefficient);
    }
    near *= square;
    // ln(1 + u) = 2 artanh(u / (2 + u))
    let z = u / (2.0 + u);
    let of_z = z * z;
    let mut log = 1.0 / 15.0;
    for coefficient in [1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        log = of_z.mul_add(log, coefficient);
    }
    let far = std::f32::consts::LN_2 - 2.0 * z * log - d * (u / (1.0 + u));
    let g = if square < 0.16 { near } else { far };
    0.5 * g * (exp_inline(ln_p as f32) + exp_inline(ln_q as f32))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition.
    fn exact(ln_p: f64, ln_q: f64) -> f64 {
        let (p, q) = (ln_p.exp(), ln_q.exp());
        let m = 0.5 * (p + q);
        let half = |x: f64| if x == 0.0 { 0.0 } else { 0.5 * x * (x / m).ln() };
        half(p) + half(q)
    }

    proptest! {
        #[test]
        fn terms_are_the_definition(ln_p in -40f64..0.0, apart in prop_oneof![-1e-2..1e-2, -1f64..1.0, -60f64..60.0]) {
            let ln_q = f64::min(ln_p + apart, 0.0);
            let (found, exact) = (f64::from(term(ln_p, ln_q)), exact(ln_p, ln_q));
            // The definition itself cancels where the two are near.
            let unsure = 1e-15 * (ln_p.exp() + ln_q.exp());
            prop_assert!((found - exact).abs() <= 1e-5 * exact + unsure + 1e-38, "{ln_p} {ln_q}: {found} {exact}");
        }
    }

    #[test]
    fn what_has_no_probability_adds_nothing() {
        let never = f64::NEG_INFINITY;
        assert_eq!(term(never, never), 0.0);
        // What one of them never says.
        assert!((term(0.0, never) - 0.5 * std::f32::consts::LN_2).abs() < 1e-7);
        assert_eq!(term(-3.0, -3.0), 0.0);
    }

    #[test]
    fn rows_are_added_in_any_number_of_runs() {
        let p: Vec<f32> = (0..40).map(|i| (i * 7 % 11) as f32).collect();
        let q: Vec<f32> = (0..40).map(|i| (i * 5 % 13) as f32).collect();
        let lse = |x: &[f32], t: usize| -> f64 {
            x.iter().skip(t).step_by(4).map(|x| f64::from(*x).exp()).sum::<f64>().ln()
        };
        let [of_p, of_q] = [&p, &q].map(|x| (0..4).map(|t| lse(x, t)).collect::<Vec<_>>());
        let (mut whole, mut parts) = (vec![0.0; 4], vec![0.0; 4]);
        jensen_shannon(&p, &q, 4, &of_p, &of_q, &mut whole);
        for range in [0..12, 12..12, 12..40] {
            jensen_shannon(&p[range.clone()], &q[range], 4, &of_p, &of_q, &mut parts);
        }
        assert_eq!(whole, parts);
        for t in 0..4 {
            let pairs =
                (0..10).map(|row| (f64::from(p[4 * row + t]) - of_p[t], f64::from(q[4 * row + t]) - of_q[t]));
            let exact: f64 = pairs.map(|(p, q)| exact(p, q)).sum();
            assert!((whole[t] - exact).abs() < 1e-6 * exact, "{whole:?} {exact}");
        }
    }
}
