//! A sparse matrix as it is learned, masks kept.
//!
//! ```text
//! products see   kept weights as they are stored, +0 elsewhere (+ S, as it is stored, over its groups)
//! a derivative g by those:   a kept weight gets its g, a dropped one none, S_ij the sum of g over its group
//! ```
//!
//! Rounding is straight through: what is stored is what the loss was measured of. (Fitting each sub-layer's outputs with masks
//! held: "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", 2025.)

use llmpress_formats::Dtype;
use llmpress_learn::{Adam, Rate, Variable};
use rayon::prelude::*;

use crate::quads::{QUAD, places};
use crate::report::Finished;
use crate::rounding::rounded;
use crate::slorb::{GROUP, groups};

/// How fast kept weights move, in root mean squares of those of their matrix.
const WEIGHTS: f32 = 0.02;
/// How fast S moves, in the same.
const SUMS: f32 = 0.005;

/// A matrix that is learned.
pub(crate) struct Masked {
    dtype: Dtype,
    cols: usize,
    masks: Vec<u8>,
    /// Before rounding, `[rows, cols / 2]`.
    values: Vec<f32>,
    by_value: Adam,
    /// Before rounding, `[rows, groups]`; empty where there is none.
    sums: Vec<f32>,
    by_sum: Adam,
    rate: f32,
    /// What products see, `[rows, cols]`.
    weights: Vec<f32>,
}

impl Masked {
    /// From what its rule left.
    pub(crate) fn new(start: &Finished) -> Self {
        let values = start.sparse.values().to_vec();
        let sums = start.sums.clone().unwrap_or_default();
        let squares: f64 = values.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        let mut masked = Self {
            dtype: start.dtype,
            cols: start.sparse.cols(),
            masks: start.sparse.masks().to_vec(),
            by_value: Adam::new(values.len()),
            by_sum: Adam::new(sums.len()),
            rate: (squares / values.len().max(1) as f64).sqrt() as f32,
            weights: vec![0.0; values.len() * 2],
            values,
            sums,
        };
        masked.weigh();
        masked
    }

    /// What products see.
    fn weigh(&mut self) {
        let (cols, dtype) = (self.cols, self.dtype);
        let (of_row, sums) = (groups(cols), &self.sums);
        let rows = self.weights.par_chunks_exact_mut(cols).zip(self.values.par_chunks_exact(cols / 2));
        rows.zip(self.masks.par_chunks_exact(cols / QUAD)).enumerate().for_each(
            |(row, ((w, values), masks))| {
                for ((quad, values), mask) in w.chunks_exact_mut(QUAD).zip(values.chunks_exact(2)).zip(masks)
                {
                    let [first, second] = places(*mask);
                    quad.fill(0.0);
                    (quad[first], quad[second]) = (rounded(values[0], dtype), rounded(values[1], dtype));
                }
                let sums = sums.get(row * of_row..(row + 1) * of_row).unwrap_or_default();
                for (group, s) in w.chunks_mut(GROUP).zip(sums) {
                    let s = rounded(*s, dtype);
                    group.iter_mut().for_each(|w| *w += s);
                }
            },
        );
    }

    /// Puts what was learned in the place of what its rule left.
    pub(crate) fn finish(self, into: &mut Finished) {
        let dtype = self.dtype;
        let learned = into.sparse.values_mut().iter_mut().zip(&self.values);
        learned.for_each(|(to, value)| *to = rounded(*value, dtype));
        if let Some(sums) = &mut into.sums {
            sums.iter_mut().zip(&self.sums).for_each(|(to, s)| *to = rounded(*s, dtype));
        }
    }
}

impl Variable for Masked {
    fn weights(&self) -> &[f32] {
        &self.weights
    }

    fn step(&mut self, gradient: &[f32], rate: &Rate) {
        let (cols, size, dtype) = (self.cols, self.rate, self.dtype);
        let by = WEIGHTS * size;
        let rows = self
            .values
            .par_chunks_exact_mut(cols / 2)
            .zip(self.by_value.first.par_chunks_exact_mut(cols / 2))
            .zip(self.by_value.second.par_chunks_exact_mut(cols / 2))
            .zip(self.masks.par_chunks_exact(cols / QUAD))
            .zip(gradient.par_chunks_exact(cols));
        rows.with_min_len(8).for_each(|((((values, first), second), masks), gradient)| {
            let kept =
                values.chunks_exact_mut(2).zip(first.chunks_exact_mut(2)).zip(second.chunks_exact_mut(2));
            for (((values, first), second), (gradient, mask)) in
                kept.zip(gradient.chunks_exact(QUAD).zip(masks))
            {
                for (at, p) in places(*mask).into_iter().enumerate() {
                    let next = values[at] - by * rate.step(&mut first[at], &mut second[at], gradient[p]);
                    // What the dtype does not reach stays.
                    if rounded(next, dtype).is_finite() {
                        values[at] = next;
                    }
                }
            }
        });
        if !self.sums.is_empty() {
            let (of_row, by) = (groups(cols), SUMS * size);
            let rows = self
                .sums
                .par_chunks_exact_mut(of_row)
                .zip(self.by_sum.first.par_chunks_exact_mut(of_row))
                .zip(self.by_sum.second.par_chunks_exact_mut(of_row))
                .zip(gradient.par_chunks_exact(cols));
            rows.with_min_len(8).for_each(|(((sums, first), second), gradient)| {
                let all = sums.iter_mut().zip(first).zip(second).zip(gradient.chunks(GROUP));
                for (((s, first), second), gradient) in all {
                    let next = *s - by * rate.step(first, second, gradient.iter().sum());
                    if rounded(next, dtype).is_finite() {
                        *s = next;
                    }
                }
            });
        }
        self.weigh();
    }
}

/// A matrix that stays as it is beside those that are learned.
pub(crate) struct Still(pub(crate) Vec<f32>);

impl Variable for Still {
    fn weights(&self) -> &[f32] {
        &self.0
    }

    fn step(&mut self, _gradient: &[f32], _rate: &Rate) {}
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use llmpress_formats::Checkpoint;
    use llmpress_learn::{Given, Gradients, Kept, Net};
    use llmpress_model::{Model, Panels, SubLayer};

    use super::*;
    use crate::masks::magnitude;
    use crate::quads::Sparse;
    use crate::report::Report;
    use crate::slorb::sum_preserving;
    use crate::testing::noise;
    use crate::{Rule, Sparsifier};

    fn finished(tensor: &str, weights: &[f32], cols: usize, how: Sparsifier) -> Finished {
        let sparse = Sparse::new(weights, magnitude(weights), cols).unwrap();
        let sums = how.slorb.then(|| sum_preserving(weights, &sparse.dense(), cols));
        let report = Report {
            tensor: tensor.to_owned(),
            rule: Rule::Magnitude,
            instead: None,
            tokens: 0,
            damping: None,
            reconstructed: None,
            unlearned: None,
            relative_error: 0.0,
            bits_per_weight: 0.0,
            seconds: 0.0,
        };
        Finished { tensor: tensor.to_owned(), dtype: Dtype::F32, sparse, sums, report }
    }

    /// The first step of Adam goes as far whatever the derivative is, against its sign.
    #[test]
    fn kept_weights_and_sums_go_down_the_derivative_of_the_loss_by_them() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden/llama");
        let model = Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap();
        for site in [SubLayer::Attention(0), SubLayer::Mlp(0)] {
            let net = Net::new(&model, site).unwrap();
            let hidden = model.config().hidden_size;
            let mut x = Panels::zeros(hidden, 9);
            x.data_mut().iter_mut().enumerate().for_each(|(i, x)| *x = noise(1, i));
            let how = Sparsifier { slorb: true, ..Sparsifier::new(Rule::Magnitude) };
            let start: Vec<Finished> = net
                .tensors()
                .iter()
                .map(|tensor| {
                    let cols = model.checkpoint().tensor(tensor).unwrap().shape[1] as usize;
                    finished(tensor, &model.weights(tensor).unwrap(), cols, how)
                })
                .collect();
            let mut kept = Kept::default();
            let mut loss = |all: &[Finished], y: &mut Panels| -> f64 {
                let weights: Vec<Vec<f32>> = all.iter().map(Finished::product).collect();
                let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
                net.forward(Given::of(&weights), &x, &mut kept, y).unwrap();
                y.data().iter().enumerate().map(|(i, y)| f64::from(y - noise(2, i)).powi(2)).sum()
            };
            let mut y = Panels::default();
            loss(&start, &mut y);
            y.data_mut().iter_mut().enumerate().for_each(|(i, y)| *y = 2.0 * (*y - noise(2, i)));
            let weights: Vec<Vec<f32>> = start.iter().map(Finished::product).collect();
            let given: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
            let mut gradients = Gradients::zeros(weights.iter().map(Vec::len));
            let mut again = Kept::default();
            net.forward(Given::of(&given), &x, &mut again, &mut Panels::default()).unwrap();
            net.backward(Given::of(&given), &x, &mut again, (&mut y, &[]), &mut gradients, None);
            let mut y = Panels::default();
            let (mut checked, mut checked_sums) = (0, 0);
            for (at, matrix) in start.iter().enumerate() {
                let mut masked = Masked::new(matrix);
                assert!(masked.weights() == weights[at], "learning starts where the rule ended");
                masked.step(&gradients.matrices[at], &Rate::at(10, 100));
                let mut after = matrix.clone();
                masked.finish(&mut after);
                assert!(after.sparse.masks() == matrix.sparse.masks());
                let h = 1e-2 * matrix.sparse.values().iter().fold(0f32, |a, b| a.max(b.abs()));
                for entry in (0..matrix.sparse.values().len()).step_by(97) {
                    let mut by = |by: f32| {
                        let mut all = start.clone();
                        all[at].sparse.values_mut()[entry] += by;
                        loss(&all, &mut y)
                    };
                    let slope = (by(h) - by(-h)) / (2.0 * f64::from(h));
                    let moved = after.sparse.values()[entry] - matrix.sparse.values()[entry];
                    if slope.abs() > 1e-2 {
                        assert!(f64::from(moved) * slope < 0.0, "{}: {moved} {slope}", matrix.tensor);
                        checked += 1;
                    }
                }
                let (sums, moved) = (matrix.sums.as_ref().unwrap(), after.sums.as_ref().unwrap());
                for entry in (0..sums.len()).step_by(7) {
                    let mut by = |by: f32| {
                        let mut all = start.clone();
                        all[at].sums.as_mut().unwrap()[entry] += by;
                        loss(&all, &mut y)
                    };
                    let slope = (by(h) - by(-h)) / (2.0 * f64::from(h));
                    if slope.abs() > 1e-2 {
                        let moved = f64::from(moved[entry] - sums[entry]);
                        assert!(moved * slope < 0.0, "{}: {moved} {slope}", matrix.tensor);
                        checked_sums += 1;
                    }
                }
            }
            assert!(checked > 20 && checked_sums > 20, "{checked} {checked_sums}");
        }
    }

    #[test]
    fn dropped_weights_stay_plus_zero_and_what_is_seen_is_what_is_stored() {
        let (rows, cols) = (5, 36);
        let weights: Vec<f32> = (0..rows * cols).map(|i| noise(3, i)).collect();
        for slorb in [false, true] {
            let how = Sparsifier { slorb, ..Sparsifier::new(Rule::Magnitude) };
            let mut start = finished("w", &weights, cols, how);
            start.dtype = Dtype::BF16;
            let mut masked = Masked::new(&start);
            for step in 0..20 {
                let gradient: Vec<f32> = (0..rows * cols).map(|i| noise(step as usize, i)).collect();
                masked.step(&gradient, &Rate::at(step, 20));
            }
            let seen = masked.weights().to_vec();
            let mut end = start.clone();
            masked.finish(&mut end);
            assert!(end.product() == seen && end.sparse != start.sparse);
            assert!(end.sparse.values().iter().all(|w| w.to_bits() & 0xffff == 0));
            if !slorb {
                for (quad, mask) in seen.chunks_exact(QUAD).zip(start.sparse.masks()) {
                    assert!((0..QUAD).all(|p| mask >> p & 1 == 1 || quad[p].to_bits() == 0));
                }
            }
        }
    }
}
