//! The product of a matrix with one token of each of several sequences: weights are read once for all of them.
//!
//! A token alone is added up in an order of its own, so each gets the product that it gets by itself.

use std::ops::Range;

use llmpress_formats::{Checkpoint, Result};
use llmpress_kernels::cpu::dot_rows;
use rayon::prelude::*;

use super::{BUFFERS, Buffers, Linear};
use crate::Panels;

/// Of each token the input, and some rows of the output.
type Parts<'a> = Vec<(&'a [f32], &'a mut [f32])>;

/// `out = W x (+ b)` for each pair of a token and what becomes of it.
pub(crate) fn multiply_side_by_side(
    checkpoint: &Checkpoint,
    linear: &Linear,
    pairs: Vec<(&Panels, &mut Panels)>,
) -> Result<()> {
    let rows = linear.rows;
    let step = linear.task_rows(rows, 1);
    let mut tasks: Vec<(Range<usize>, Parts<'_>)> =
        (0..rows).step_by(step).map(|first| (first..(first + step).min(rows), Vec::new())).collect();
    for (x, out) in pairs {
        debug_assert_eq!((x.features(), x.tokens()), (linear.cols, 1));
        out.resize(rows, 1);
        for (task, part) in tasks.iter_mut().zip(out.data_mut().chunks_mut(step)) {
            task.1.push((x.data(), part));
        }
    }
    tasks.into_par_iter().with_max_len(1).try_for_each(|(rows, mut parts)| {
        BUFFERS.with_borrow_mut(|buffers| linear.run_side_by_side(checkpoint, rows, &mut parts, buffers))
    })
}

impl Linear {
    /// One task: some rows for every token in turn, while their weights are near.
    fn run_side_by_side(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        parts: &mut [(&[f32], &mut [f32])],
        buffers: &mut Buffers,
    ) -> Result<()> {
        if self.source.in_place() {
            for (x, out) in &mut *parts {
                self.source.dot(checkpoint, rows.clone(), x, out, &mut buffers.words)?;
            }
        } else {
            let elements = self.source.elements(checkpoint, rows.clone(), &mut buffers.words)?;
            parts.iter_mut().for_each(|(x, out)| dot_rows(elements, x.len(), x, out));
        }
        if let Some(bias) = &self.bias {
            for (_, out) in parts {
                out.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, bias)| *y += bias);
            }
        }
        Ok(())
    }
}
