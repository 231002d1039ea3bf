//! How much each token counts.
//!
//! ```text
//! e = |what is to be added to the stream|^2 of a token      share = 1 / (tokens max(e, the median of all e))
//! ```
//!
//! Models give a few tokens, the first one above all, streams that are thousands of times as large as all others (Sun et al.,
//! "Massive activations in large language models", 2024). In a plain sum of squares nothing but those would count.

use llmpress_kernels::cpu::PANEL;
use llmpress_model::Panels;
use rayon::prelude::*;

/// Where nothing is to be added.
const LEAST: f64 = 1e-30;

/// The squares of differences of each token.
pub(crate) fn squares(a: &Panels, b: &Panels) -> Vec<f64> {
    let of_panel = |panel: usize| -> Vec<f64> {
        let width = a.width(panel);
        let mut sums = [0.0f64; PANEL];
        for (a, b) in a.panel(panel).chunks_exact(width).zip(b.panel(panel).chunks_exact(width)) {
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                let away = f64::from(a - b);
                *sum += away * away;
            }
        }
        sums[..width].to_vec()
    };
    let panels: Vec<Vec<f64>> = (0..a.count()).into_par_iter().map(of_panel).collect();
    panels.concat()
}

/// The share of each token, from the squares of what is to be added.
pub(crate) fn shares(energies: &[f64]) -> Vec<f64> {
    let mut sorted = energies.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0).max(LEAST);
    energies.iter().map(|e| 1.0 / (energies.len() as f64 * e.max(median))).collect()
}

/// The sum of squares, each times its token's share.
pub(crate) fn weighed(squares: &[f64], shares: &[f64]) -> f64 {
    squares.iter().zip(shares).map(|(square, share)| square * share).sum()
}

/// Adds the derivative of [`weighed`] squares of `y - target` by `y` to `d`.
pub(crate) fn weighed_back(y: &Panels, target: &Panels, shares: &[f64], d: &mut Panels) {
    let ranges: Vec<_> = (0..y.count()).map(|panel| y.range(panel)).collect();
    let panels: Vec<_> = d.panels_mut().enumerate().collect();
    panels.into_par_iter().for_each(|(panel, d)| {
        let width = ranges[panel].len();
        let mut scales = [0.0f32; PANEL];
        let shares = &shares[ranges[panel].clone()];
        scales.iter_mut().zip(shares).for_each(|(scale, share)| *scale = (2.0 * share) as f32);
        let rows = y.panel(panel).chunks_exact(width).zip(target.panel(panel).chunks_exact(width));
        for (d, (y, target)) in d.chunks_exact_mut(width).zip(rows) {
            for (((d, y), target), scale) in d.iter_mut().zip(y).zip(target).zip(&scales) {
                *d += scale * (y - target);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_token_counts_more_than_its_share_and_a_huge_one_counts_as_one() {
        let shares = shares(&[1e9, 1.0, 4.0, 2.0, 0.0]);
        let exact = [2e-10, 0.1, 0.05, 0.1, 0.1];
        assert!(
            shares.iter().zip(exact).all(|(found, exact)| (found / exact - 1.0f64).abs() < 1e-12),
            "{shares:?}"
        );
        // Each a hundredth of what is to be added, off: a hundredth.
        let found = weighed(&[1e7, 0.01, 0.04, 0.02, 0.0], &shares);
        // All but the one that is to stay, and that is below the median, come to a hundredth.
        assert!((found - (0.01 + 0.005 + 0.01 + 0.01) / 5.0).abs() < 1e-9, "{found}");
        assert!(super::shares(&[]).is_empty());
        assert!(super::shares(&[0.0, 0.0]).iter().all(|share| (*share as f32).is_finite()));
    }

    #[test]
    fn squares_and_derivatives_are_those_of_each_token() {
        let (mut a, mut b) = (Panels::zeros(3, 99), Panels::zeros(3, 99));
        for t in 0..99 {
            for f in 0..3 {
                a.set(f, t, (t * 3 + f) as f32);
                b.set(f, t, (f * f) as f32);
            }
        }
        let found = squares(&a, &b);
        let mut d = Panels::zeros(3, 99);
        let shares: Vec<f64> = (0..99).map(|t| 0.5 + f64::from(t)).collect();
        weighed_back(&a, &b, &shares, &mut d);
        for t in 0..99 {
            let exact: f64 = (0..3).map(|f| f64::from(a.get(f, t) - b.get(f, t)).powi(2)).sum();
            assert_eq!(found[t], exact);
            let by = 2.0 * shares[t] as f32 * (a.get(1, t) - b.get(1, t));
            assert!((d.get(1, t) - by).abs() <= 1e-6 * by.abs());
        }
    }
}
