//! Weights that make up for what the layers before have lost.
//!
//! ```text
//! original outputs W X'      inputs now X      the least squares of W' X - W X', damped towards W:
//! W' = W + W D (H + damping)^-1      D = (X' - X) X^T,  (H + damping)^-1 = U^T U
//! ```
//!
//! Feedback then aims at W' instead of W. (The asymmetric objective of Li et al., "GPTAQ", 2025, solved before the rounding
//! instead of column by column.)

use llmpress_kernels::cpu::{PANEL, multiply};
use rayon::prelude::*;

use crate::Factor;

/// Rows of a product.
const ROWS: usize = 64;

/// Moves `W`, rows of as many columns as the factor has, so large a share of the way to `W'`; `drift` is D, `[n, n]`.
pub fn retarget(weights: &mut [f32], drift: &[f32], factor: &Factor, share: f32) {
    if share == 0.0 {
        return;
    }
    let n = factor.len();
    let order = factor.order();
    // W D, its columns in the factor's order.
    let wd = product(weights, n, |k, t| drift[k * n + order[t] as usize], |_| 0..n);
    let mut y = product(&wd, n, |k, t| factor.at(t, k), |columns| columns.start..n);
    drop(wd);
    y = product(&y, n, |k, t| factor.at(k, t), |columns| 0..columns.end);
    for (w, y) in weights.chunks_exact_mut(n).zip(y.chunks_exact(n)) {
        for (&column, y) in order.iter().zip(y) {
            w[column as usize] += share * y;
        }
    }
}

/// `X M`, rows of n, by panels of columns; `m(k, t)` is an element of M, zero outside `rows` of a panel's columns.
fn product(
    x: &[f32],
    n: usize,
    m: impl Fn(usize, usize) -> f32 + Sync,
    rows: impl Fn(std::ops::Range<usize>) -> std::ops::Range<usize> + Sync,
) -> Vec<f32> {
    let count = x.len() / n;
    let panels: Vec<Vec<f32>> = (0..n.div_ceil(PANEL))
        .into_par_iter()
        .with_max_len(1)
        .map(|at| {
            let columns = at * PANEL..(at * PANEL + PANEL).min(n);
            let (width, rows) = (columns.len(), rows(columns.clone()));
            let panel: Vec<f32> = rows
                .clone()
                .flat_map(|k| columns.clone().map(move |t| (k, t)))
                .map(|(k, t)| m(k, t))
                .collect();
            let mut out = vec![0.0; count * width];
            for (x, out) in x.chunks(ROWS * n).zip(out.chunks_mut(ROWS * width)) {
                multiply(&x[rows.start..], n, &panel, width, out);
            }
            out
        })
        .collect();
    let mut out = vec![0.0; x.len()];
    for (at, panel) in panels.iter().enumerate() {
        let width = PANEL.min(n - at * PANEL);
        for (out, panel) in out.chunks_exact_mut(n).zip(panel.chunks_exact(width)) {
            out[at * PANEL..][..width].copy_from_slice(panel);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use llmpress_model::Panels;

    use super::*;
    use crate::{Drift, Extent, Moments, Order};

    #[test]
    fn weights_that_make_up_for_drift_give_out_what_the_original_gave() {
        let (rows, n, tokens) = (5, 130, 2000);
        let noise = |i: usize| {
            let x = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            ((x ^ x >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let (mut was, mut now) = (Panels::zeros(n, tokens), Panels::zeros(n, tokens));
        for t in 0..tokens {
            let x: Vec<f32> = (0..n).map(|f| noise(t * n + f) * (0.5 + (f % 5) as f32)).collect();
            was.set_token(t, x.iter().copied());
            // Each feature is a little less than it was, and a little of its neighbour.
            now.set_token(t, (0..n).map(|f| 0.8 * x[f] + 0.1 * x[(f + 1) % n]));
        }
        let mut moments = Moments::new(n, Extent::Full).unwrap();
        moments.add(&now).unwrap();
        let mut drift = Drift::new(n).unwrap();
        drift.add(&now, &was).unwrap();
        let (factor, drift) = (Factor::new(moments.close(), Order::Falling).unwrap(), drift.close());
        let original: Vec<f32> = (0..rows * n).map(|i| noise(i + 7_000_000)).collect();
        let error = |weights: &[f32]| -> f64 {
            let mut sum = 0.0;
            for (w, o) in weights.chunks_exact(n).zip(original.chunks_exact(n)) {
                for t in 0..tokens {
                    let y: f64 = w.iter().zip(now.token(t)).map(|(w, x)| f64::from(w * x)).sum();
                    let wanted: f64 = o.iter().zip(was.token(t)).map(|(w, x)| f64::from(w * x)).sum();
                    sum += (y - wanted).powi(2);
                }
            }
            sum
        };
        let of = |share: f32| {
            let mut weights = original.clone();
            retarget(&mut weights, &drift, &factor, share);
            error(&weights)
        };
        let (none, half, all) = (of(0.0), of(0.5), of(1.0));
        assert!(none == error(&original) && half < 0.4 * none && all < 0.01 * none, "{none} {half} {all}");
    }
}
