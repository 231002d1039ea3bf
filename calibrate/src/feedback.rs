//! Error feedback along the columns of a matrix, a block at a time (Frantar et al., "GPTQ", 2022, section 3.3).
//!
//! ```text
//! columns in the factor's order: e_i = (w_i - what is kept of it) / U_ii, w_j -= e_i U_ij for all j after i
//!
//! |<- block: one by one, by the caller ->|<---- the rest: E U at once, when the block is done ---->|
//! ```
//!
//! Rows do not touch each other and are the work of one task each: the bits do not depend on the number of threads. The
//! squares of e add up to the error weighted by the damped Hessian.

use std::ops::Range;

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{PANEL, multiply};
use rayon::prelude::*;

use crate::Factor;

/// Columns of a block.
const BLOCK: usize = 128;
/// Rows of a task.
const ROWS: usize = 16;

/// A block of a row, its columns in the factor's order.
#[derive(Debug)]
pub struct Piece<'a> {
    /// The row.
    pub row: usize,
    /// The columns, as places in the factor's order. All blocks but the last have a multiple of 128.
    pub columns: Range<usize>,
    /// Their weights, as feedback has left them.
    pub weights: &'a mut [f32],
    /// What is chosen for each.
    pub chosen: &'a mut [u8],
    /// Takes e of each.
    pub feedback: &'a mut [f32],
}

/// Goes over the columns of a matrix: `w` and what is `chosen` are rows of as many columns as `factor` has, in its order
/// ([`Factor::ordered`]). `one_by_one` settles a block of a row and returns the sum of the squares of e. Returns the sum of
/// all squares; the weights are as they were settled, or as feedback left them where that was.
///
/// # Errors
/// Not whole rows, or not as many of both.
pub fn feed_back(
    w: &mut [f32],
    chosen: &mut [u8],
    factor: &Factor,
    one_by_one: impl Fn(Piece<'_>) -> f64 + Sync,
) -> Result<f64> {
    let n = factor.len();
    if n == 0 || !w.len().is_multiple_of(n) || chosen.len() != w.len() {
        return Err(Error::Invalid(format!("{} weights are no rows of {n}", w.len())));
    }
    let mut errors = vec![0.0f64; w.len() / n];
    let mut panels = Vec::new();
    for first in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - first);
        let rest = first + width;
        pack(factor, first, width, &mut panels);
        let panels = &panels[..];
        let tasks = w
            .par_chunks_mut(ROWS * n)
            .zip(chosen.par_chunks_mut(ROWS * n))
            .zip(errors.par_chunks_mut(ROWS))
            .enumerate();
        tasks.for_each(|(task, ((w, chosen), errors))| {
            let mut feedback = [0.0f32; ROWS * BLOCK];
            let feedback = &mut feedback[..errors.len() * width];
            let each = w.chunks_exact_mut(n).zip(chosen.chunks_exact_mut(n)).zip(errors.iter_mut());
            for ((i, ((w, chosen), error)), e) in each.enumerate().zip(feedback.chunks_exact_mut(width)) {
                *error += one_by_one(Piece {
                    row: task * ROWS + i,
                    columns: first..rest,
                    weights: &mut w[first..rest],
                    chosen: &mut chosen[first..rest],
                    feedback: e,
                });
            }
            let mut products = [0.0f32; ROWS * PANEL];
            for (at, panel) in panels.chunks(width * PANEL).enumerate() {
                let across = panel.len() / width;
                let products = &mut products[..errors.len() * across];
                multiply(feedback, width, panel, across, products);
                for (w, products) in w.chunks_exact_mut(n).zip(products.chunks_exact(across)) {
                    let w = &mut w[rest + at * PANEL..][..across];
                    w.iter_mut().zip(products).for_each(|(w, p)| *w -= p);
                }
            }
        });
    }
    Ok(errors.iter().sum())
}

/// Rows `first ..` of U right of the block, in panels of columns.
fn pack(factor: &Factor, first: usize, width: usize, panels: &mut Vec<f32>) {
    let columns = factor.len() - first - width;
    panels.resize(columns * width, 0.0);
    panels.par_chunks_mut(width * PANEL).enumerate().for_each(|(at, panel)| {
        let across = panel.len() / width;
        for (i, to) in panel.chunks_exact_mut(across).enumerate() {
            to.copy_from_slice(&factor.row(first + i)[width - i + at * PANEL..][..across]);
        }
    });
}
