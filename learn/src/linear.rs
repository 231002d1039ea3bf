//! Products with weights, and what derivatives take of them.
//!
//! ```text
//! y = W x (+ b)        dx = W^T dy        dW += dy x^T
//! ```

use std::ops::Range;

use llmpress_kernels::cpu::{PANEL, multiply};
use llmpress_model::Panels;
use rayon::prelude::*;

/// Rows of a task.
const ROWS: usize = 64;
/// Values that a task adds.
const PIECE: usize = 1 << 14;
/// Rows of a transposed matrix that are written side by side: a cache line of the original.
const LINE: usize = 16;

/// `y = W x (+ b)`, for weights that are rows of as many columns as `x` has features.
pub(crate) fn product(weights: &[f32], bias: Option<&[f32]>, x: &Panels, y: &mut Panels) {
    let cols = x.features();
    y.resize(weights.len() / cols.max(1), x.tokens());
    y.row_blocks_mut(ROWS).into_par_iter().with_max_len(1).enumerate().for_each(|(block, mut parts)| {
        let first = block * ROWS;
        for (panel, part) in parts.iter_mut().enumerate() {
            let width = x.width(panel);
            let count = part.len() / width;
            multiply(&weights[first * cols..(first + count) * cols], cols, x.panel(panel), width, part);
            if let Some(bias) = bias {
                for (y, bias) in part.chunks_exact_mut(width).zip(&bias[first..]) {
                    y.iter_mut().for_each(|y| *y += bias);
                }
            }
        }
    });
}

/// `[cols, rows]` of a matrix of rows of `cols`.
pub(crate) fn transposed(weights: &[f32], cols: usize, out: &mut Vec<f32>) {
    let rows = weights.len() / cols.max(1);
    out.resize(weights.len(), 0.0);
    out.par_chunks_mut((LINE * rows).max(1)).enumerate().for_each(|(block, out)| {
        let first = block * LINE;
        for (row, weights) in weights.chunks_exact(cols).enumerate() {
            let columns = &weights[first..(first + LINE).min(cols)];
            for (out, w) in out[row..].iter_mut().step_by(rows).zip(columns) {
                *out = *w;
            }
        }
    });
}

/// Room for the way back through matrices.
#[derive(Debug, Default)]
pub(crate) struct Room {
    turned: Vec<f32>,
    sum: Panels,
    pub(crate) by_feature: ByFeature,
    pub(crate) by_token: ByToken,
}

/// A matrix on the way back.
#[derive(Clone, Copy)]
pub(crate) struct Back<'a> {
    pub(crate) weights: &'a [f32],
    pub(crate) cols: usize,
    /// The same turned, where that is there already.
    pub(crate) turned: Option<&'a [f32]>,
}

impl Back<'_> {
    /// `dx = W^T d`.
    pub(crate) fn product(&self, d: &Panels, room: &mut Room, dx: &mut Panels) {
        if let Some(turned) = self.turned {
            return product(turned, None, d, dx);
        }
        transposed(self.weights, self.cols, &mut room.turned);
        product(&room.turned, None, d, dx);
    }
}

/// `dx = sum W^T d` over matrices that multiply the same, each with the derivative by what it gives out.
pub(crate) fn back<'a>(
    of: impl IntoIterator<Item = (Back<'a>, &'a Panels)>,
    room: &mut Room,
    dx: &mut Panels,
) {
    for (at, (matrix, d)) in of.into_iter().enumerate() {
        if at == 0 {
            matrix.product(d, room, dx);
            continue;
        }
        let mut sum = std::mem::take(&mut room.sum);
        matrix.product(d, room, &mut sum);
        let pieces = dx.data_mut().par_chunks_mut(PIECE).zip(sum.data().par_chunks(PIECE));
        pieces.for_each(|(dx, more)| dx.iter_mut().zip(more).for_each(|(dx, more)| *dx += more));
        room.sum = sum;
    }
}

/// Activations with their tokens as rows, in panels of features: what a sum over tokens multiplies.
#[derive(Debug, Default)]
pub(crate) struct ByToken {
    features: usize,
    tokens: usize,
    /// Panels of [`PANEL`] features, `panel[token * width + feature]`.
    data: Vec<f32>,
}

impl ByToken {
    /// Takes activations.
    pub(crate) fn take(&mut self, x: &Panels) {
        (self.features, self.tokens) = (x.features(), x.tokens());
        self.data.resize(x.features() * x.tokens(), 0.0);
        self.data.par_chunks_mut((PANEL * x.tokens()).max(1)).enumerate().for_each(|(block, out)| {
            let across = out.len() / x.tokens();
            for panel in 0..x.count() {
                let (range, width) = (x.range(panel), x.width(panel));
                let rows = x.panel(panel)[block * PANEL * width..].chunks_exact(width).take(across);
                let out = &mut out[range.start * across..range.end * across];
                for (feature, row) in rows.enumerate() {
                    for (out, x) in out[feature..].iter_mut().step_by(across).zip(row) {
                        *out = *x;
                    }
                }
            }
        });
    }
}

/// Rows of activations: each feature's tokens one after the other.
#[derive(Debug, Default)]
pub(crate) struct ByFeature {
    tokens: usize,
    data: Vec<f32>,
}

impl ByFeature {
    /// Takes activations.
    pub(crate) fn take(&mut self, x: &Panels) {
        self.tokens = x.tokens();
        self.data.resize(x.features() * x.tokens(), 0.0);
        let blocks = self.data.par_chunks_mut((ROWS * x.tokens()).max(1)).enumerate();
        blocks.with_max_len(1).for_each(|(block, rows)| {
            for panel in 0..x.count() {
                let (range, width) = (x.range(panel), x.width(panel));
                let from = x.panel(panel)[block * ROWS * width..].chunks_exact(width);
                for (row, from) in rows.chunks_exact_mut(x.tokens()).zip(from) {
                    row[range.clone()].copy_from_slice(from);
                }
            }
        });
    }

    /// Adds the sum over tokens of each feature.
    pub(crate) fn add_sums(&self, out: &mut [f32]) {
        let rows = self.data.chunks_exact(self.tokens.max(1));
        out.iter_mut().zip(rows).for_each(|(out, row)| *out += row.iter().sum::<f32>());
    }

    /// Some features.
    pub(crate) fn rows(&self, features: Range<usize>) -> &[f32] {
        &self.data[features.start * self.tokens..features.end * self.tokens]
    }
}

/// `dW += dy x^T`: rows of as many columns as `x` has features.
pub(crate) fn add_gradient(dy: &ByFeature, x: &ByToken, out: &mut [f32]) {
    let (cols, tokens) = (x.features, x.tokens);
    out.par_chunks_mut((ROWS * cols).max(1)).with_max_len(1).enumerate().for_each(|(block, out)| {
        let count = out.len() / cols;
        let dy = dy.rows(block * ROWS..block * ROWS + count);
        let mut tile = [0.0f32; ROWS * PANEL];
        for (panel, x) in x.data.chunks(PANEL * tokens).enumerate() {
            let width = x.len() / tokens;
            let tile = &mut tile[..count * width];
            multiply(dy, tokens, x, width, tile);
            for (out, tile) in out.chunks_exact_mut(cols).zip(tile.chunks_exact(width)) {
                out[panel * PANEL..][..width].iter_mut().zip(tile).for_each(|(out, d)| *out += d);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use llmpress_numbers::Numbers;

    use super::*;

    fn normal(seed: u64, count: usize) -> Vec<f32> {
        let mut numbers = Numbers::new(seed);
        (0..count).map(|_| numbers.float()).collect()
    }

    #[test]
    fn products_and_both_derivatives_are_those_of_the_definitions() {
        for (rows, cols, tokens) in [(1, 1, 1), (3, 5, 2), (64, 48, 48), (67, 49, 100), (130, 20, 97)] {
            let weights = normal(rows as u64, rows * cols);
            let bias = normal(7, rows);
            let (mut x, mut dy) = (Panels::zeros(cols, tokens), Panels::zeros(rows, tokens));
            x.data_mut().copy_from_slice(&normal(8, cols * tokens));
            dy.data_mut().copy_from_slice(&normal(9, rows * tokens));
            let (mut y, mut dx, mut turned) = (Panels::default(), Panels::default(), Vec::new());
            product(&weights, Some(&bias), &x, &mut y);
            transposed(&weights, cols, &mut turned);
            product(&turned, None, &dy, &mut dx);
            let (mut by_feature, mut by_token) = (ByFeature::default(), ByToken::default());
            by_feature.take(&dy);
            by_token.take(&x);
            let mut dw = vec![1.0; rows * cols];
            add_gradient(&by_feature, &by_token, &mut dw);
            let sum = |terms: &mut dyn Iterator<Item = (f32, f32)>| -> f64 {
                terms.map(|(a, b)| f64::from(a) * f64::from(b)).sum()
            };
            let close =
                |found: f32, exact: f64| assert!((f64::from(found) - exact).abs() < 1e-4, "{found} {exact}");
            for r in 0..rows {
                for t in 0..tokens {
                    let exact = sum(&mut (0..cols).map(|c| (weights[r * cols + c], x.get(c, t))));
                    close(y.get(r, t), exact + f64::from(bias[r]));
                }
                for c in 0..cols {
                    close(dw[r * cols + c], 1.0 + sum(&mut (0..tokens).map(|t| (dy.get(r, t), x.get(c, t)))));
                }
            }
            for c in 0..cols {
                for t in 0..tokens {
                    close(dx.get(c, t), sum(&mut (0..rows).map(|r| (weights[r * cols + c], dy.get(r, t)))));
                }
            }
        }
    }
}
