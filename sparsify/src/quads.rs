//! Which two of every four consecutive inputs a row keeps.
//!
//! ```text
//! columns   0 1 2 3 | 4 5 6 7 | ...        a byte a quad: bit p stands for its column p, two bits are set
//! kept      . x . x | x x . . |            0b1010, 0b0011
//! ```

use llmpress_formats::{Error, Result};
use rayon::prelude::*;

/// Columns of a quad.
pub const QUAD: usize = 4;

/// All ways to keep two of four.
pub(crate) const MASKS: [u8; 6] = [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100];

/// The two places that a mask keeps, in their order.
pub(crate) fn places(mask: u8) -> [usize; 2] {
    let first = mask.trailing_zeros().min(3) as usize;
    let second = (7 - mask.leading_zeros().min(7)) as usize;
    [first, second.min(3)]
}

/// The two of the highest scores; of equal ones those of the lowest columns.
pub(crate) fn best_two(scores: [f64; QUAD]) -> u8 {
    let mut order = [0usize, 1, 2, 3];
    // Stable: what is equal stays in the order of columns.
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    1 << order[0] | 1 << order[1]
}

/// The same, but of equal ones those of the highest columns.
pub(crate) fn best_two_late([a, b, c, d]: [f64; QUAD]) -> u8 {
    // Four bits the other way round.
    best_two([d, c, b, a]).reverse_bits() >> 4
}

/// A matrix of which two in four are kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparse {
    cols: usize,
    /// `[rows, cols / 4]`.
    masks: Vec<u8>,
    /// `[rows, cols / 2]`: kept values, in the order of their columns.
    values: Vec<f32>,
}

impl Sparse {
    /// Of `weights`, rows of `cols`, what `masks` keep of them, a mask a quad.
    ///
    /// # Errors
    /// Not whole rows of quads; a mask that does not keep two.
    pub fn new(weights: &[f32], masks: Vec<u8>, cols: usize) -> Result<Self> {
        let whole = cols > 0 && cols.is_multiple_of(QUAD) && weights.len().is_multiple_of(cols);
        if !whole || masks.len() * QUAD != weights.len() {
            return Err(Error::Invalid(format!(
                "{} weights and {} masks are no rows of {cols} columns in quads",
                weights.len(),
                masks.len()
            )));
        }
        if let Some(mask) = masks.iter().find(|mask| !MASKS.contains(mask)) {
            return Err(Error::Invalid(format!("mask {mask:#b} does not keep two of four")));
        }
        let mut values = vec![0.0; weights.len() / 2];
        values.par_chunks_exact_mut(2).zip(weights.par_chunks_exact(QUAD)).zip(&masks).for_each(
            |((values, quad), mask)| {
                let [first, second] = places(*mask);
                values.copy_from_slice(&[quad[first], quad[second]]);
            },
        );
        Ok(Self { cols, masks, values })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.masks.len() * QUAD / self.cols.max(1)
    }

    /// Columns, dropped ones as well.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// A mask a quad, `[rows, cols / 4]`: bit p of it says that column p of the quad is kept.
    pub fn masks(&self) -> &[u8] {
        &self.masks
    }

    /// Kept values in the order of their columns, `[rows, cols / 2]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The same places with other values, `[rows, cols / 2]`.
    ///
    /// # Errors
    /// Not as many values.
    pub fn with_values(self, values: Vec<f32>) -> Result<Self> {
        if values.len() != self.values.len() {
            return Err(Error::Invalid(format!(
                "{} values for {} that are kept",
                values.len(),
                self.values.len()
            )));
        }
        Ok(Self { values, ..self })
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// All weights, `[rows, cols]`; what is dropped is +0.
    pub fn dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.masks.len() * QUAD];
        self.write(&mut dense);
        dense
    }

    /// Puts the kept values where they lie in a dense matrix, and +0 in all other places.
    pub(crate) fn write(&self, dense: &mut [f32]) {
        let quads = dense.par_chunks_exact_mut(QUAD).zip(self.values.par_chunks_exact(2));
        quads.zip(&self.masks).with_min_len(4096).for_each(|((quad, values), mask)| {
            let [first, second] = places(*mask);
            quad.fill(0.0);
            (quad[first], quad[second]) = (values[0], values[1]);
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn of_equal_scores_the_lowest_columns_are_kept() {
        assert_eq!(best_two([0.0; 4]), 0b0011);
        assert_eq!(best_two([1.0, 2.0, 2.0, 2.0]), 0b0110);
        assert_eq!(best_two([0.0, 0.0, 0.0, 5.0]), 0b1001);
        assert_eq!(best_two([f64::INFINITY, 3.0, f64::INFINITY, 4.0]), 0b0101);
        assert_eq!(best_two_late([0.0; 4]), 0b1100);
        assert_eq!(best_two_late([1.0, 2.0, 2.0, 2.0]), 0b1100);
        assert_eq!(best_two_late([2.0, 2.0, 2.0, 1.0]), 0b0110);
        assert_eq!(best_two_late([0.0, 0.0, 0.0, 5.0]), 0b1100);
        assert_eq!(best_two_late([5.0, 1.0, 0.0, 1.0]), 0b1001);
        let all: Vec<[usize; 2]> = MASKS.iter().map(|mask| places(*mask)).collect();
        assert_eq!(all, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
    }

    proptest! {
        #[test]
        fn every_quad_keeps_exactly_two_and_the_rest_is_plus_zero(
            rows in 0usize..4,
            quads in 1usize..6,
            bits in proptest::collection::vec(any::<u32>(), 0..96),
        ) {
            let cols = quads * QUAD;
            let at = |i: usize| bits.get(i % bits.len().max(1)).copied().unwrap_or_default();
            let weights: Vec<f32> = (0..rows * cols).map(|i| f32::from_bits(at(i))).collect();
            let masks: Vec<u8> = weights
                .chunks_exact(QUAD)
                .map(|quad| best_two(std::array::from_fn(|p| f64::from(quad[p].abs()))))
                .collect();
            let sparse = Sparse::new(&weights, masks, cols).unwrap();
            prop_assert_eq!((sparse.rows(), sparse.cols()), (rows, cols));
            let dense = sparse.dense();
            for ((dense, was), mask) in dense.chunks_exact(QUAD).zip(weights.chunks_exact(QUAD)).zip(sparse.masks()) {
                prop_assert_eq!(mask.count_ones(), 2);
                for p in 0..QUAD {
                    let expected = if mask >> p & 1 == 1 { was[p].to_bits() } else { 0 };
                    prop_assert_eq!(dense[p].to_bits(), expected);
                }
            }
        }
    }

    #[test]
    fn what_is_no_rows_of_quads_is_refused() {
        assert!(Sparse::new(&[0.0; 8], vec![3, 3], 4).is_ok());
        assert!(Sparse::new(&[0.0; 8], vec![3, 3], 8).is_ok());
        for (count, masks, cols) in
            [(8, vec![3], 4), (8, vec![3, 7], 4), (8, vec![3, 1], 4), (6, vec![3], 6), (8, vec![3, 3], 0)]
        {
            assert!(Sparse::new(&vec![0.0; count], masks, cols).is_err());
        }
    }
}
