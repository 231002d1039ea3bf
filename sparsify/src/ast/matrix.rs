//! A matrix as it is trained: all of its weights, of which products see those that the mask keeps.
//!
//! ```text
//! products see   W where the mask keeps it, as it is stored, else +0 (+ S over its groups)
//! a derivative g by those goes straight through to every W, dropped or not; S_ij gets the sum of g over its group
//! ```

use llmpress_formats::{Dtype, Error, Result};
use rayon::prelude::*;

use super::optimiser::Update;
use super::vector::squares;
use crate::masks::magnitude;
use crate::quads::{QUAD, Sparse, places};
use crate::report::Finished;
use crate::rounding::rounded;
use crate::slorb::{GROUP, groups, sum_preserving};

/// What a dropped weight may be at the start, of the lesser of those that its quad keeps: masks are those of the start until
/// training says otherwise, whatever rule found them.
const BELOW: f32 = 0.5;

/// The rate of S, of that of weights: each of it is added to all columns of its group.
const SUMS: f32 = 0.25;

/// Where training a matrix begins: what a one-shot rule left of it.
#[derive(Clone, Debug)]
pub struct Start {
    /// Its name.
    pub tensor: String,
    /// The dtype of its values.
    pub dtype: Dtype,
    /// What is kept.
    pub sparse: Sparse,
    /// S, `[rows, ceil(cols / 16)]`, where there is one.
    pub sums: Option<Vec<f32>>,
}

impl Start {
    /// What the product multiplies, `[rows, cols]`.
    pub fn product(&self) -> Vec<f32> {
        let mut weights = self.sparse.dense();
        if let Some(sums) = &self.sums {
            crate::slorb::add(sums, self.sparse.cols(), &mut weights);
        }
        weights
    }
}

impl From<&Finished> for Start {
    fn from(done: &Finished) -> Self {
        Self {
            tensor: done.tensor.clone(),
            dtype: done.dtype,
            sparse: done.sparse.clone(),
            sums: done.sums.clone(),
        }
    }
}

/// A matrix that is trained.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) tensor: String,
    pub(super) dtype: Dtype,
    pub(super) cols: usize,
    pub(super) masks: Vec<u8>,
    /// All weights, before rounding, `[rows, cols]`.
    pub(super) dense: Vec<f32>,
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
    /// Before rounding, `[rows, groups]`; empty where there is none.
    pub(super) sums: Vec<f32>,
    pub(super) sums_first: Vec<f32>,
    pub(super) sums_second: Vec<f32>,
    /// What products see, `[rows, cols]`.
    pub(super) seen: Vec<f32>,
}

impl Matrix {
    /// From what a rule left of `original`, the dense weights; with `slorb` sums are there in any case: those that preserve sums
    /// where the start has none.
    pub(super) fn new(start: &Start, original: Vec<f32>, slorb: bool) -> Result<Self> {
        let (cols, count) = (start.sparse.cols(), start.sparse.masks().len() * QUAD);
        if original.len() != count {
            return Err(Error::Invalid(format!(
                "{}: {} weights are not those of its dense original, {}",
                start.tensor,
                count,
                original.len()
            )));
        }
        let sums = match &start.sums {
            Some(sums) => sums.clone(),
            None if slorb => sum_preserving(&original, &start.sparse.dense(), cols),
            None => Vec::new(),
        };
        let mut dense = original;
        dense
            .par_chunks_exact_mut(QUAD)
            .zip(start.sparse.values().par_chunks_exact(2))
            .zip(start.sparse.masks())
            .with_min_len(4096)
            .for_each(|((quad, values), mask)| {
                let least = BELOW * values[0].abs().min(values[1].abs());
                quad.iter_mut().filter(|w| w.abs() > least).for_each(|w| *w = least.copysign(*w));
                let [first, second] = places(*mask);
                (quad[first], quad[second]) = (values[0], values[1]);
            });
        let zeros = |count| vec![0.0f32; count];
        let mut matrix = Self {
            tensor: start.tensor.clone(),
            dtype: start.dtype,
            cols,
            masks: start.sparse.masks().to_vec(),
            first: zeros(count),
            second: zeros(count),
            sums_first: zeros(sums.len()),
            sums_second: zeros(sums.len()),
            seen: zeros(count),
            dense,
            sums,
        };
        matrix.see();
        Ok(matrix)
    }

    /// What products see, from what is learned.
    pub(super) fn see(&mut self) {
        let (cols, dtype) = (self.cols, self.dtype);
        let (of_row, sums) = (groups(cols), &self.sums);
        let rows = self.seen.par_chunks_exact_mut(cols).zip(self.dense.par_chunks_exact(cols));
        rows.zip(self.masks.par_chunks_exact(cols / QUAD)).with_min_len(8).enumerate().for_each(
            |(row, ((seen, dense), masks))| {
                for ((seen, dense), mask) in
                    seen.chunks_exact_mut(QUAD).zip(dense.chunks_exact(QUAD)).zip(masks)
                {
                    let [first, second] = places(*mask);
                    seen.fill(0.0);
                    (seen[first], seen[second]) =
                        (rounded(dense[first], dtype), rounded(dense[second], dtype));
                }
                let sums = sums.get(row * of_row..(row + 1) * of_row).unwrap_or_default();
                for (group, s) in seen.chunks_mut(GROUP).zip(sums) {
                    let s = rounded(*s, dtype);
                    group.iter_mut().for_each(|w| *w += s);
                }
            },
        );
    }

    /// The sum of squares of all derivatives, S's included.
    pub(super) fn squares(&self, gradient: &[f32]) -> f64 {
        let mut all = squares(gradient);
        if !self.sums.is_empty() {
            let rows: Vec<f64> = gradient
                .par_chunks_exact(self.cols)
                .with_min_len(8)
                .map(|row| row.chunks(GROUP).map(|g| f64::from(g.iter().sum::<f32>()).powi(2)).sum())
                .collect();
            all += rows.iter().sum::<f64>();
        }
        all
    }

    /// One step down the derivative of the loss by what products see.
    pub(super) fn step(&mut self, gradient: &[f32], update: Update) {
        let (cols, dtype) = (self.cols, self.dtype);
        let rows = self
            .dense
            .par_chunks_exact_mut(cols)
            .zip(self.first.par_chunks_exact_mut(cols))
            .zip(self.second.par_chunks_exact_mut(cols))
            .zip(self.masks.par_chunks_exact(cols / QUAD))
            .zip(gradient.par_chunks_exact(cols));
        rows.with_min_len(8).for_each(|((((dense, first), second), masks), gradient)| {
            let moments = first.chunks_exact_mut(QUAD).zip(second.chunks_exact_mut(QUAD));
            let quads = dense.chunks_exact_mut(QUAD).zip(moments).zip(gradient.chunks_exact(QUAD)).zip(masks);
            for (((dense, (first, second)), gradient), mask) in quads {
                for p in 0..QUAD {
                    let decays = f32::from(1 - (mask >> p & 1));
                    let next = update.step(dense[p], &mut first[p], &mut second[p], gradient[p], decays);
                    // What the dtype does not reach stays.
                    if next.abs() < LARGEST || rounded(next, dtype).is_finite() {
                        dense[p] = next;
                    }
                }
            }
        });
        if !self.sums.is_empty() {
            let (of_row, update) = (groups(cols), update.plain().times(SUMS));
            let rows = self
                .sums
                .par_chunks_exact_mut(of_row)
                .zip(self.sums_first.par_chunks_exact_mut(of_row))
                .zip(self.sums_second.par_chunks_exact_mut(of_row))
                .zip(gradient.par_chunks_exact(cols));
            rows.with_min_len(8).for_each(|(((sums, first), second), gradient)| {
                let all = sums.iter_mut().zip(first).zip(second).zip(gradient.chunks(GROUP));
                for (((s, first), second), gradient) in all {
                    let next = update.step(*s, first, second, gradient.iter().sum(), 0.0);
                    if rounded(next, dtype).is_finite() {
                        *s = next;
                    }
                }
            });
        }
    }

    /// Masks by what the weights are now. Returns how many quads keep others than before.
    pub(super) fn choose(&mut self) -> u64 {
        let masks = magnitude(&self.dense);
        let flips = masks.iter().zip(&self.masks).filter(|(new, old)| new != old).count();
        self.masks = masks;
        flips as u64
    }

    /// What is kept, and S, as they are stored.
    pub(super) fn finish(&self) -> Result<Start> {
        let mut sparse = Sparse::new(&self.dense, self.masks.clone(), self.cols)?;
        sparse.values_mut().iter_mut().for_each(|w| *w = rounded(*w, self.dtype));
        let sums = self.sums.iter().map(|s| rounded(*s, self.dtype)).collect();
        Ok(Start {
            tensor: self.tensor.clone(),
            dtype: self.dtype,
            sparse,
            sums: (!self.sums.is_empty()).then_some(sums),
        })
    }
}

/// What every dtype of weights reaches.
const LARGEST: f32 = 6e4;
