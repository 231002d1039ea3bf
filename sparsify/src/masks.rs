//! Masks of single weights: no column makes up for another.
//!
//! ```text
//! magnitude   |w|
//! wanda       |w| ||x||_2, the norm of the input channel (Sun et al., "A Simple and Effective Pruning Approach for Large
//!             Language Models", 2023)
//! ```
//!
//! Of equal ones the highest columns are kept. In a model that was quantised once many are equal: SmolLM2-135M, where the cut goes
//! between equal weights in 15 % of the quads, has a perplexity of 1,532 so, and 2,583 with the lowest columns.

use rayon::prelude::*;

use crate::quads::{QUAD, best_two_late};

/// Keeps the two greatest weights of every quad. Rows of a multiple of four columns; a mask a quad.
pub fn magnitude(weights: &[f32]) -> Vec<u8> {
    let quads = weights.par_chunks_exact(QUAD);
    quads.map(|quad| best_two_late(std::array::from_fn(|p| f64::from(quad[p].abs())))).collect()
}

/// Keeps the two weights of every quad whose products with their inputs are greatest. `squares` are the means of squares of
/// each of as many columns, a multiple of four; a mask a quad.
pub fn wanda(weights: &[f32], squares: &[f64]) -> Vec<u8> {
    let norms: Vec<f64> = squares.iter().map(|square| square.max(0.0).sqrt()).collect();
    let quads = weights.par_chunks_exact(QUAD).enumerate();
    quads
        .map(|(at, quad)| {
            let norms = &norms[at * QUAD % norms.len()..][..QUAD];
            best_two_late(std::array::from_fn(|p| f64::from(quad[p].abs()) * norms[p]))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_go_by_the_weight_or_by_what_it_gives_out() {
        let weights = [1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, -0.0, 0.0, 1e-40, -1e38, 5.0, 5.0, 5.0, 5.0];
        assert_eq!(magnitude(&weights), [0b0110, 0b1100, 0b1100, 0b1100]);
        // Two rows of eight columns.
        let squares = [100.0, 0.0, 1.0, 4.0, 1.0, 1.0, 2.0, 3.0];
        assert_eq!(wanda(&weights, &squares), [0b1001, 0b1100, 0b1100, 0b1100]);
        assert_eq!(magnitude(&[]), [0u8; 0]);
        // Channels that were always zero say nothing: the highest columns.
        assert_eq!(wanda(&weights[..4], &[0.0; 4]), [0b1100]);
    }
}
