//! SLoRB: weights for sums of inputs, beside the sparse matrix (Huang et al., "Pruning Large Language Models with
//! Semi-Structural Adaptive Sparse Training", 2024, section 3.3).
//!
//! ```text
//! y = W' x + S (X x)      X sums 16 inputs each: it is fixed, and nothing of it is stored
//!
//! R = W - W', what is missing
//! sums preserved:   S_ij = mean of R over group j of row i
//! least squares:    S = R H X^T (X H X^T)^-1, H the damped Hessian
//! ```

use llmpress_calibrate::Moments;
use llmpress_kernels::cpu::{PANEL, multiply};
use rayon::prelude::*;

/// Columns of a group.
pub const GROUP: usize = 16;
/// Rows of a task.
const ROWS: usize = 64;

/// Groups of so many columns; the last may be shorter.
pub fn groups(cols: usize) -> usize {
    cols.div_ceil(GROUP)
}

/// S that preserves the sums of groups: the mean of what is missing, `[rows, groups]`. `weights` and `stored` are rows of
/// `cols`.
pub fn sum_preserving(weights: &[f32], stored: &[f32], cols: usize) -> Vec<f32> {
    let mut s = vec![0.0f32; weights.len() / cols.max(1) * groups(cols)];
    let rows = weights.par_chunks_exact(cols.max(1)).zip(stored.par_chunks_exact(cols.max(1)));
    rows.zip(s.par_chunks_exact_mut(groups(cols).max(1))).for_each(|((w, stored), s)| {
        for (s, (w, stored)) in s.iter_mut().zip(w.chunks(GROUP).zip(stored.chunks(GROUP))) {
            let missing: f64 = w.iter().zip(stored).map(|(w, v)| f64::from(*w) - f64::from(*v)).sum();
            *s = (missing / w.len() as f64) as f32;
        }
    });
    s
}

/// Adds S to each column of its group: what the product computes, as one matrix.
pub fn add(s: &[f32], cols: usize, weights: &mut [f32]) {
    let rows = weights.par_chunks_exact_mut(cols.max(1)).zip(s.par_chunks_exact(groups(cols).max(1)));
    rows.for_each(|(row, s)| {
        for (group, s) in row.chunks_mut(GROUP).zip(s) {
            group.iter_mut().for_each(|w| *w += s);
        }
    });
}

/// What the least-squares start goes by: of the damped Hessian its sums over groups of columns, and the factor of those over
/// groups of both.
#[derive(Clone, Debug)]
pub struct LeastSquares {
    cols: usize,
    /// H X^T, `[cols, groups]`.
    by_group: Vec<f32>,
    /// X H X^T = L L^T, `[groups, groups]`.
    lower: Vec<f64>,
}

impl LeastSquares {
    /// Of closed moments, with what is added to their diagonal. `None` where they are not full, or rounding leaves nothing
    /// positive definite.
    pub fn new(moments: &Moments, damp: f64) -> Option<Self> {
        let (cols, h) = (moments.features(), moments.full()?);
        let groups = groups(cols);
        let mut by_group = vec![0.0f32; cols * groups];
        let rows = by_group.par_chunks_exact_mut(groups.max(1)).zip(h.par_chunks_exact(cols.max(1)));
        rows.enumerate().for_each(|(at, (to, row))| {
            for (to, group) in to.iter_mut().zip(row.chunks(GROUP)) {
                *to = group.iter().map(|h| f64::from(*h)).sum::<f64>() as f32;
            }
            to[at / GROUP] += damp as f32;
        });
        let mut lower = vec![0.0f64; groups * groups];
        for (at, row) in by_group.chunks_exact(groups.max(1)).enumerate() {
            let to = &mut lower[at / GROUP * groups..][..groups];
            to.iter_mut().zip(row).for_each(|(to, h)| *to += f64::from(*h));
        }
        factor(&mut lower, groups).then_some(Self { cols, by_group, lower })
    }

    /// S, `[rows, groups]`, of what is missing, rows of as many columns as the moments have.
    pub fn solve(&self, missing: &[f32]) -> Vec<f32> {
        let (cols, groups) = (self.cols, groups(self.cols));
        let mut s = vec![0.0f32; missing.len() / cols.max(1) * groups];
        let mut panels = Vec::with_capacity(self.by_group.len());
        for first in (0..groups).step_by(PANEL) {
            let width = PANEL.min(groups - first);
            let rows = self.by_group.chunks_exact(groups);
            panels.push(rows.flat_map(|row| &row[first..first + width]).copied().collect::<Vec<f32>>());
        }
        let tasks = s.par_chunks_mut((ROWS * groups).max(1)).zip(missing.par_chunks((ROWS * cols).max(1)));
        tasks.for_each(|(s, missing)| {
            let mut products = [0.0f32; ROWS * PANEL];
            for (at, panel) in panels.iter().enumerate() {
                let width = panel.len() / cols;
                let products = &mut products[..missing.len() / cols * width];
                multiply(missing, cols, panel, width, products);
                for (s, products) in s.chunks_exact_mut(groups).zip(products.chunks_exact(width)) {
                    s[at * PANEL..][..width].copy_from_slice(products);
                }
            }
            let mut x = vec![0.0f64; groups];
            for s in s.chunks_exact_mut(groups) {
                x.iter_mut().zip(&*s).for_each(|(x, s)| *x = f64::from(*s));
                substitute(&self.lower, &mut x);
                s.iter_mut().zip(&x).for_each(|(s, x)| *s = *x as f32);
            }
        });
        s
    }
}

/// `A = L L^T` in the lower half; false where A is not positive definite.
fn factor(a: &mut [f64], n: usize) -> bool {
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
            let rest = a[i * n + j] - dot;
            if i > j {
                a[i * n + j] = rest / a[j * n + j];
            } else if rest > 0.0 && rest.is_finite() {
                a[i * n + i] = rest.sqrt();
            } else {
                return false;
            }
        }
    }
    true
}

/// Solves `L L^T x = b` in place.
fn substitute(l: &[f64], x: &mut [f64]) {
    let n = x.len();
    for i in 0..n {
        let dot: f64 = l[i * n..i * n + i].iter().zip(&x[..i]).map(|(l, x)| l * x).sum();
        x[i] = (x[i] - dot) / l[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|k| l[k * n + i] * x[k]).sum();
        x[i] = (x[i] - dot) / l[i * n + i];
    }
}

#[cfg(test)]
mod tests {
    use llmpress_calibrate::output_energy;

    use super::*;
    use crate::masks::magnitude;
    use crate::quads::Sparse;
    use crate::testing::{moments, noise};

    #[test]
    fn the_sum_preserving_start_preserves_the_sums_of_groups() {
        for (rows, cols) in [(1, 4), (3, 16), (5, 36), (7, 100)] {
            let weights: Vec<f32> = (0..rows * cols).map(|i| noise(3, i)).collect();
            let stored = Sparse::new(&weights, magnitude(&weights), cols).unwrap().dense();
            let s = sum_preserving(&weights, &stored, cols);
            // As published: of untouched kept weights the mean of those that are dropped.
            let dropped: f32 = weights[..GROUP.min(cols)]
                .iter()
                .zip(&stored)
                .filter(|(_, v)| **v == 0.0)
                .map(|(w, _)| w)
                .sum();
            assert!((s[0] - dropped / GROUP.min(cols) as f32).abs() < 1e-6);
            let mut whole = stored.clone();
            add(&s, cols, &mut whole);
            for (whole, weights) in whole.chunks_exact(cols).zip(weights.chunks_exact(cols)) {
                for (whole, weights) in whole.chunks(GROUP).zip(weights.chunks(GROUP)) {
                    let sum = |x: &[f32]| x.iter().sum::<f32>();
                    assert!((sum(whole) - sum(weights)).abs() < 1e-5, "{rows} x {cols}");
                }
            }
        }
    }

    #[test]
    fn the_least_squares_start_is_where_no_other_gives_out_less_error() {
        for (rows, cols) in [(2, 4), (9, 36), (70, 832)] {
            let moments = moments(cols, 2 * cols + 7, 0);
            let damp = 0.01 * moments.diagonal().iter().sum::<f64>() / cols as f64;
            let missing: Vec<f32> = (0..rows * cols).map(|i| noise(4, i)).collect();
            let s = LeastSquares::new(&moments, damp).unwrap().solve(&missing);
            let error = |s: &[f32]| {
                let mut left: Vec<f32> = missing.iter().map(|m| -m).collect();
                add(s, cols, &mut left);
                let squares: f64 = left.iter().map(|&d| f64::from(d).powi(2)).sum();
                output_energy(&left, &moments).unwrap() + damp * squares
            };
            let least = error(&s);
            assert!(least <= error(&sum_preserving(&missing, &vec![0.0; missing.len()], cols)));
            for seed in 0..4 {
                let other: Vec<f32> = s.iter().enumerate().map(|(i, s)| s + 1e-2 * noise(seed, i)).collect();
                assert!(least < error(&other), "{rows} x {cols}");
            }
        }
        let diagonal = Moments::new(4, llmpress_calibrate::Extent::Diagonal).unwrap().close();
        assert!(LeastSquares::new(&diagonal, 1.0).is_none());
    }
}
