//! Error feedback (Frantar et al., "GPTQ", 2022) on a grid that is held fixed.
//!
//! ```text
//! columns by falling h: q_i = nearest(w_i), e_i = (w_i - q_i) / U_ii, w_j -= e_i U_ij for all j after i
//! ```

use llmpress_calibrate::{Factor, Piece, feed_back};
use llmpress_formats::{Error, Result};

use crate::Grid;
use crate::line::Line;

/// What error feedback chose.
#[derive(Clone, Debug, PartialEq)]
pub struct Fed {
    /// Codes, `[rows, cols]`.
    pub codes: Vec<u8>,
    /// trace(D H D^T) of the change D of all weights, H damped.
    pub error: f64,
}

/// Chooses codes of a matrix, rows of as many columns as `grid` and `factor` have. The weights of dead columns count as
/// zero.
///
/// # Errors
/// Sizes that do not go together.
pub fn gptq(weights: &[f32], grid: &Grid, factor: &Factor) -> Result<Fed> {
    let (rows, n) = (grid.rows(), grid.cols());
    if weights.len() != rows * n || factor.len() != n {
        return Err(Error::Invalid(format!(
            "{} weights and a Hessian of {} columns do not go with a grid of {rows} x {n}",
            weights.len(),
            factor.len()
        )));
    }
    let step = grid.spec().abq.group_columns(n);
    let groups = grid.spec().abq.groups(n);
    let top = f32::from(grid.spec().top());
    let group_of: Vec<u32> = factor.order().iter().map(|&column| column / step as u32).collect();
    let mut w = factor.ordered(weights);
    let mut chosen = vec![0u8; rows * n];
    let error = feed_back(&mut w, &mut chosen, factor, |piece| {
        let lines: Vec<Line> = (0..groups).map(|group| grid.line(piece.row, group)).collect();
        let (first, width) = (piece.columns.start, piece.columns.len());
        one_by_one(
            piece,
            |at| lines[group_of[first + at] as usize],
            |at| &factor.row(first + at)[..width - at],
            top,
        )
    })?;
    drop(w);
    Ok(Fed { codes: factor.put_back(&chosen), error })
}

/// A block of a row, column by column.
fn one_by_one<'a>(
    Piece { weights: w, chosen, feedback, .. }: Piece<'_>,
    line: impl Fn(usize) -> Line,
    upper: impl Fn(usize) -> &'a [f32],
    top: f32,
) -> f64 {
    let mut total = 0.0;
    for at in 0..w.len() {
        let (line, u) = (line(at), upper(at));
        let code = line.code(w[at], top);
        let e = (w[at] - line.value(code)) / u[0];
        chosen[at] = code as u8;
        feedback[at] = e;
        total += f64::from(e) * f64::from(e);
        w[at + 1..].iter_mut().zip(&u[1..]).for_each(|(w, u)| *w -= e * u);
    }
    total
}

#[cfg(test)]
pub(crate) mod tests {
    use llmpress_calibrate::{DAMPING, Extent, Moments, Order, output_energy};
    use llmpress_formats::encoding::abq::Abq;
    use llmpress_model::Panels;

    use super::*;
    use crate::{Rung, Spec, ZeroPoint};

    pub(crate) fn noise(seed: usize, i: usize) -> f32 {
        let x = (i as u64 * 0x9E37_79B9 + seed as u64 * 0x85EB_CA6B + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        ((x ^ x >> 31) as u32 as f32) / (1u64 << 31) as f32 - 1.0
    }

    pub(crate) fn moments(features: usize, tokens: usize, dead: usize) -> Moments {
        let mut x = Panels::zeros(features, tokens);
        for t in 0..tokens {
            // Columns depend on each other, and differ in size.
            let shared = noise(t, 9999);
            let of = |f: usize| (noise(t, f) + 0.7 * shared) * (0.2 + (f % 11) as f32);
            x.set_token(t, (0..features).map(|f| if f % 31 < dead { 0.0 } else { of(f) }));
        }
        let mut moments = Moments::new(features, Extent::Full).unwrap();
        moments.add(&x).unwrap();
        moments.close()
    }

    /// The equations of GPTQ one after the other, in double precision: the inverse of the Hessian by elimination, and
    /// after each column the next inverse from it (Frantar et al., equations 2 and 3). `choose` settles the weight of a row
    /// and a column: its code and its value.
    pub(crate) fn plain(
        (weights, n): (&[f32], usize),
        h: &[f32],
        order: &[u32],
        choose: impl Fn(usize, usize, f32) -> (u8, f32),
    ) -> Vec<u8> {
        let mean =
            (0..n).map(|i| f64::from(h[i * n + i])).map(|d| if d == 0.0 { 1.0 } else { d }).sum::<f64>()
                / n as f64;
        let mut inverse = vec![0.0f64; n * n];
        let mut a: Vec<f64> = h.iter().map(|&x| f64::from(x)).collect();
        for i in 0..n {
            inverse[i * n + i] = 1.0;
            a[i * n + i] += DAMPING * mean + if h[i * n + i] == 0.0 { 1.0 } else { 0.0 };
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
        let mut w: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
        (0..n).filter(|&i| h[i * n + i] == 0.0).for_each(|i| {
            w.iter_mut().skip(i).step_by(n).for_each(|w| *w = 0.0);
        });
        let mut codes = vec![0; w.len()];
        for &q in order {
            let q = q as usize;
            let pivot = inverse[q * n + q];
            for (row, w) in w.chunks_exact_mut(n).enumerate() {
                let (code, value) = choose(row, q, w[q] as f32);
                codes[row * n + q] = code;
                let e = (w[q] - f64::from(value)) / pivot;
                (0..n).for_each(|j| w[j] -= e * inverse[q * n + j]);
            }
            let column: Vec<f64> = (0..n).map(|i| inverse[i * n + q]).collect();
            for i in 0..n {
                for j in 0..n {
                    inverse[i * n + j] -= column[i] * column[j] / pivot;
                }
            }
        }
        codes
    }

    #[test]
    fn blocked_feedback_equals_the_plain_equations() {
        for (rows, n, bits, group, zero, dead) in [
            (3, 1, 4, None, ZeroPoint::Real, 0),
            (5, 40, 2, None, ZeroPoint::Real, 2),
            (17, 100, 3, Some(32), ZeroPoint::Integer, 0),
            (33, 150, 4, Some(64), ZeroPoint::Symmetric, 1),
            (20, 260, 2, Some(64), ZeroPoint::Real, 0),
        ] {
            let weights: Vec<f32> = (0..rows * n).map(|i| noise(77, i) * noise(78, i)).collect();
            let abq = Abq { group_size: group, ..Abq::new(bits) };
            let m = moments(n, 2 * n + 3, dead);
            let diagonal: Vec<f32> = m.diagonal().iter().map(|&h| h as f32).collect();
            let h = m.full().unwrap().to_vec();
            let grid =
                Grid::search(&weights, n, Spec { abq, zero, rung: Rung::Gptq, learn: None }, Some(&diagonal))
                    .unwrap();
            let factor = Factor::new(m, Order::Falling).unwrap();
            let fed = gptq(&weights, &grid, &factor).unwrap();
            let (step, top) = (grid.spec().abq.group_columns(n), f32::from(grid.spec().top()));
            let plain = plain((&weights, n), &h, factor.order(), |row, column, w| {
                let line = grid.line(row, column / step);
                let code = line.code(w, top);
                (code as u8, line.value(code))
            });
            assert_eq!(fed.codes, plain, "{rows} x {n}, {bits} bits");
        }
    }

    #[test]
    fn the_error_is_that_of_the_damped_hessian_and_below_that_of_rounding() {
        let (rows, n) = (24, 200);
        let weights: Vec<f32> = (0..rows * n).map(|i| noise(5, i)).collect();
        let m = moments(n, 500, 0);
        let diagonal: Vec<f32> = m.diagonal().iter().map(|&h| h as f32).collect();
        let spec = Spec { abq: Abq::new(2), zero: ZeroPoint::Real, rung: Rung::Gptq, learn: None };
        let grid = Grid::search(&weights, n, spec, Some(&diagonal)).unwrap();
        let mean = m.diagonal().iter().sum::<f64>() / n as f64;
        let error = |codes: &[u8]| {
            let change: Vec<f32> = grid.values(codes).iter().zip(&weights).map(|(v, w)| w - v).collect();
            let squares: f64 = change.iter().map(|&d| f64::from(d).powi(2)).sum();
            output_energy(&change, &m).unwrap() + DAMPING * mean * squares
        };
        let factor = Factor::new(m.clone(), Order::Falling).unwrap();
        let fed = gptq(&weights, &grid, &factor).unwrap();
        let (found, nearest) = (error(&fed.codes), error(&grid.nearest(&weights)));
        assert!((found / fed.error - 1.0).abs() < 1e-3, "{found} {}", fed.error);
        assert!(found < 0.8 * nearest, "{found} {nearest}");
    }

    #[test]
    fn feedback_is_the_same_bits_on_any_number_of_threads() {
        let (rows, n) = (70, 300);
        let weights: Vec<f32> = (0..rows * n).map(|i| noise(6, i)).collect();
        let spec = Spec { abq: Abq::new(3), zero: ZeroPoint::Real, rung: Rung::Gptq, learn: None };
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let grid = Grid::search(&weights, n, spec, None).unwrap();
                let factor = Factor::new(moments(n, 400, 0), Order::Falling).unwrap();
                (gptq(&weights, &grid, &factor).unwrap(), grid)
            })
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5));
        let grid = Grid::min_max(&weights[..n], n, spec).unwrap();
        let factor = Factor::new(moments(n, 20, 0), Order::Falling).unwrap();
        assert!(gptq(&weights, &grid, &factor).is_err());
    }
}
