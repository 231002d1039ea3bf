//! One shot with error feedback (Frantar and Alistarh, "SparseGPT", 2023, algorithm 1, with n:m masks of section 3.4).
//!
//! ```text
//! columns from left to right; at the first of a quad:  keep the two of the greatest w^2 / [H_c^-1]_cc
//! a column that is dropped:  e = w_c / U_cc,  w_j -= e U_cj for all j after c        [H_c^-1]_cc = U_cc^2
//! ```
//!
//! H_c is the damped Hessian of column c and those after it: what can still make up for it.

use llmpress_calibrate::{Factor, Piece, feed_back};
use llmpress_formats::{Error, Result};

use crate::quads::{QUAD, best_two};

/// What error feedback made of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Pruned {
    /// Rows of as many columns as before; what is dropped is +0.
    pub weights: Vec<f32>,
    /// A mask a quad.
    pub masks: Vec<u8>,
    /// trace(D H D^T) of the change D of all weights, H damped.
    pub error: f64,
}

/// Drops two of every four weights, rows of as many columns as `factor` has, which must be from left to right
/// ([`Order::LeftToRight`](llmpress_calibrate::Order)). The weights of dead columns count as zero.
///
/// # Errors
/// Columns that are no multiple of four or in another order; not whole rows.
pub fn sparsegpt(weights: &[f32], factor: &Factor) -> Result<Pruned> {
    let n = factor.len();
    let in_order = factor.order().iter().enumerate().all(|(at, &column)| at == column as usize);
    if !n.is_multiple_of(QUAD) || !in_order {
        return Err(Error::Invalid(format!("{n} columns are no quads from left to right")));
    }
    let mut w = factor.ordered(weights);
    let mut kept = vec![0u8; w.len()];
    let error = feed_back(&mut w, &mut kept, factor, |piece| settle(piece, factor))?;
    let masks = kept.chunks_exact(QUAD).map(|quad| quad.iter().rev().fold(0, |mask, kept| mask << 1 | kept));
    Ok(Pruned { masks: masks.collect(), weights: w, error })
}

/// A block of a row, quad by quad.
fn settle(Piece { columns, weights: w, chosen: kept, feedback, .. }: Piece<'_>, factor: &Factor) -> f64 {
    let mut total = 0.0;
    for quad in (0..w.len()).step_by(QUAD) {
        let score = |p: usize| {
            let u = f64::from(factor.row(columns.start + quad + p)[0]);
            (f64::from(w[quad + p]) / u).powi(2)
        };
        let mask = best_two(std::array::from_fn(score));
        for p in 0..QUAD {
            let at = quad + p;
            kept[at] = mask >> p & 1;
            if kept[at] == 1 {
                feedback[at] = 0.0;
                continue;
            }
            let u = &factor.row(columns.start + at)[..w.len() - at];
            let e = w[at] / u[0];
            w[at] = 0.0;
            feedback[at] = e;
            total += f64::from(e) * f64::from(e);
            w[at + 1..].iter_mut().zip(&u[1..]).for_each(|(w, u)| *w -= e * u);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use llmpress_calibrate::{DAMPING, Order, output_energy};

    use super::*;
    use crate::masks::{magnitude, wanda};
    use crate::quads::Sparse;
    use crate::testing::{moments, noise};

    /// The equations one after the other, in double precision: the inverse by elimination, and after each column the inverse of
    /// what is left of the Hessian from it (SparseGPT, equations 3 to 6).
    fn plain(weights: &[f32], n: usize, h: &[f32]) -> (Vec<f64>, Vec<u8>) {
        let dead = |i: usize| h[i * n + i] == 0.0;
        let diagonal = |i: usize| if dead(i) { 1.0 } else { f64::from(h[i * n + i]) };
        let mean = (0..n).map(diagonal).sum::<f64>() / n as f64;
        let mut inverse = vec![0.0f64; n * n];
        let mut a: Vec<f64> = h.iter().map(|&x| f64::from(x)).collect();
        for i in 0..n {
            inverse[i * n + i] = 1.0;
            a[i * n + i] = diagonal(i) + DAMPING * mean;
        }
        for i in 0..n {
            let pivot = a[i * n + i];
            (0..n).for_each(|j| {
                a[i * n + j] /= pivot;
                inverse[i * n + j] /= pivot;
            });
            for r in (0..n).filter(|&r| r != i) {
                let factor = a[r * n + i];
                (0..n).for_each(|j| {
                    a[r * n + j] -= factor * a[i * n + j];
                    inverse[r * n + j] -= factor * inverse[i * n + j];
                });
            }
        }
        // The diagonal that each column has when it is reached.
        let mut inverses = Vec::new();
        for c in 0..n {
            inverses.push(inverse.clone());
            let column: Vec<f64> = (0..n).map(|i| inverse[i * n + c]).collect();
            for i in 0..n {
                for j in 0..n {
                    inverse[i * n + j] -= column[i] * column[j] / column[c];
                }
            }
        }
        let mut w: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
        let mut masks = Vec::new();
        for w in w.chunks_exact_mut(n) {
            (0..n).filter(|&i| dead(i)).for_each(|i| w[i] = 0.0);
            for c in 0..n {
                if c % QUAD == 0 {
                    masks.push(best_two(std::array::from_fn(|p| {
                        w[c + p].powi(2) / inverses[c + p][(c + p) * (n + 1)]
                    })));
                }
                if masks[masks.len() - 1] >> (c % QUAD) & 1 == 0 {
                    let e = w[c] / inverses[c][c * (n + 1)];
                    (c..n).for_each(|j| w[j] -= e * inverses[c][c * n + j]);
                    w[c] = 0.0;
                }
            }
        }
        (w, masks)
    }

    #[test]
    fn blocked_feedback_equals_the_plain_equations() {
        for (rows, n, dead) in [(3, 4, 0), (5, 40, 2), (17, 100, 0), (33, 148, 1), (20, 260, 0)] {
            let weights: Vec<f32> = (0..rows * n).map(|i| noise(77, i) * noise(78, i)).collect();
            let moments = moments(n, 2 * n + 3, dead);
            let h = moments.full().unwrap().to_vec();
            let factor = Factor::new(moments, Order::LeftToRight).unwrap();
            let pruned = sparsegpt(&weights, &factor).unwrap();
            let (expected, masks) = plain(&weights, n, &h);
            assert_eq!(pruned.masks, masks, "{rows} x {n}");
            for (found, expected) in pruned.weights.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-4, "{rows} x {n}: {found} {expected}");
            }
            let sparse = Sparse::new(&pruned.weights, pruned.masks, n).unwrap();
            assert!(sparse.dense().iter().zip(&pruned.weights).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }

    #[test]
    fn the_error_is_that_of_the_damped_hessian_and_below_those_of_masks_alone() {
        let (rows, n) = (24, 200);
        let weights: Vec<f32> = (0..rows * n).map(|i| noise(5, i)).collect();
        let m = moments(n, 500, 0);
        let mean = m.diagonal().iter().sum::<f64>() / n as f64;
        let error = |values: &[f32]| {
            let change: Vec<f32> = values.iter().zip(&weights).map(|(v, w)| w - v).collect();
            let squares: f64 = change.iter().map(|&d| f64::from(d).powi(2)).sum();
            output_energy(&change, &m).unwrap() + DAMPING * mean * squares
        };
        let fed = sparsegpt(&weights, &Factor::new(&m, Order::LeftToRight).unwrap()).unwrap();
        let found = error(&fed.weights);
        assert!((found / fed.error - 1.0).abs() < 1e-3, "{found} {}", fed.error);
        let of = |masks| error(&Sparse::new(&weights, masks, n).unwrap().dense());
        let (by_weight, by_product) = (of(magnitude(&weights)), of(wanda(&weights, m.diagonal())));
        assert!(found < 0.7 * by_product && by_product < by_weight, "{found} {by_product} {by_weight}");
    }

    #[test]
    fn feedback_is_the_same_bits_on_any_number_of_threads_and_keeps_two_of_zeros() {
        let (rows, n) = (70, 300);
        let weights: Vec<f32> = (0..rows * n).map(|i| noise(6, i)).collect();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let factor = Factor::new(moments(n, 400, 3), Order::LeftToRight).unwrap();
                sparsegpt(&weights, &factor).unwrap()
            })
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5));
        assert!(one.masks.iter().all(|mask| mask.count_ones() == 2));
        let factor = Factor::new(moments(8, 40, 0), Order::LeftToRight).unwrap();
        let zeros = sparsegpt(&[0.0; 16], &factor).unwrap();
        assert!(zeros.masks == [0b0011; 4] && zeros.error == 0.0);
        assert!(sparsegpt(&[0.0; 8], &Factor::new(moments(8, 40, 0), Order::Falling).unwrap()).is_err());
        assert!(sparsegpt(&[0.0; 6], &Factor::new(moments(6, 40, 0), Order::LeftToRight).unwrap()).is_err());
        assert!(sparsegpt(&[0.0; 9], &factor).is_err());
    }
}
