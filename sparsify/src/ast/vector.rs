//! A norm's weights as they are learned.

use llmpress_formats::Dtype;
use rayon::prelude::*;

use super::optimiser::Update;
use crate::rounding::rounded;

/// Values that have no masks.
#[derive(Clone, Debug)]
pub(super) struct Vector {
    dtype: Dtype,
    /// What a family adds to what is stored.
    offset: f32,
    /// Before rounding, as they are stored.
    pub(super) values: Vec<f32>,
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
    /// As they multiply.
    pub(super) seen: Vec<f32>,
}

impl Vector {
    /// Of what multiplies.
    pub(super) fn new(seen: &[f32], dtype: Dtype, offset: f32) -> Self {
        let values: Vec<f32> = seen.iter().map(|w| w - offset).collect();
        let zeros = vec![0.0; values.len()];
        Self { dtype, offset, first: zeros.clone(), second: zeros, values, seen: seen.to_vec() }
    }

    pub(super) fn step(&mut self, gradient: &[f32], update: Update) {
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((w, (first, second)), gradient) in self.values.iter_mut().zip(moments).zip(gradient) {
            let next = update.step(*w, first, second, *gradient, 0.0);
            // What the dtype does not reach stays.
            if rounded(next, self.dtype).is_finite() {
                *w = next;
            }
        }
        self.see();
    }

    /// What multiplies, from what is learned.
    pub(super) fn see(&mut self) {
        let (dtype, offset) = (self.dtype, self.offset);
        self.seen.iter_mut().zip(&self.values).for_each(|(to, w)| *to = rounded(*w, dtype) + offset);
    }

    /// As they are stored.
    pub(super) fn stored(&self) -> Vec<f32> {
        self.values.iter().map(|w| rounded(*w, self.dtype)).collect()
    }
}

/// The sum of squares, the same on any number of threads.
pub(super) fn squares(values: &[f32]) -> f64 {
    const PIECE: usize = 1 << 14;
    let of = |piece: &[f32]| piece.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let sums: Vec<f64> = values.par_chunks(PIECE).map(of).collect();
    sums.iter().sum()
}
