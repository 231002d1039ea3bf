//! Error feedback along the columns (Frantar et al., "GPTQ", 2022) on a grid that is held fixed.
//!
//! ```text
//! columns by falling h: q_i = nearest(w_i), e_i = (w_i - q_i) / U_ii, w_j -= e_i U_ij for all j after i
//!
//! |<- block: one by one ->|<---- the rest: E U at once, when the block is done ---->|
//! ```
//!
//! Rows do not touch each other and are the work of one task each: the bits do not depend on the number of threads. The
//! squares of e add up to the error weighted by the damped Hessian.

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{PANEL, multiply};
use rayon::prelude::*;

use crate::line::Line;
use crate::{Factor, Grid};

/// Columns of a block.
const BLOCK: usize = 128;
/// Rows of a task.
const ROWS: usize = 16;

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
    let (order, dead) = (factor.order(), factor.dead());
    let step = grid.spec().abq.group_columns(n);
    let groups = grid.spec().abq.groups(n);
    let top = f32::from(grid.spec().top());
    let group_of: Vec<u32> = order.iter().map(|&column| column / step as u32).collect();
    // Columns in the order in which they are quantised, and their codes.
    let mut w = vec![0.0f32; rows * n];
    w.par_chunks_exact_mut(n).zip(weights.par_chunks_exact(n)).for_each(|(to, from)| {
        for (to, &column) in to.iter_mut().zip(order) {
            *to = if dead[column as usize] { 0.0 } else { from[column as usize] };
        }
    });
    let mut chosen = vec![0u8; rows * n];
    let mut errors = vec![0.0f64; rows];
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
                let row = task * ROWS + i;
                let lines: Vec<Line> = (0..groups).map(|group| grid.line(row, group)).collect();
                let block = first..rest;
                *error += one_by_one(
                    &mut w[block.clone()],
                    &mut chosen[block.clone()],
                    e,
                    |at| lines[group_of[first + at] as usize],
                    |at| &factor.row(first + at)[..width - at],
                    top,
                );
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
    let mut codes = vec![0u8; rows * n];
    codes.par_chunks_exact_mut(n).zip(chosen.par_chunks_exact(n)).for_each(|(to, from)| {
        from.iter().zip(order).for_each(|(code, &column)| to[column as usize] = *code);
    });
    Ok(Fed { codes, error: errors.iter().sum() })
}

/// A block of a row, column by column.
fn one_by_one<'a>(
    w: &mut [f32],
    chosen: &mut [u8],
    feedback: &mut [f32],
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

#[cfg(test)]
mod tests {
    use llmpress_calibrate::{Extent, Moments, output_energy};
    use llmpress_formats::encoding::abq::Abq;
    use llmpress_model::Panels;

    use super::*;
    use crate::{DAMPING, Rung, Spec, ZeroPoint};

    fn noise(seed: usize, i: usize) -> f32 {
        let x = (i as u64 * 0x9E37_79B9 + seed as u64 * 0x85EB_CA6B + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        ((x ^ x >> 31) as u32 as f32) / (1u64 << 31) as f32 - 1.0
    }

    fn moments(features: usize, tokens: usize, dead: usize) -> Moments {
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
    /// after each column the next inverse from it (Frantar et al., equations 2 and 3).
    fn plain(weights: &[f32], grid: &Grid, h: &[f32], order: &[u32]) -> Vec<u8> {
        let n = grid.cols();
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
        let step = grid.spec().abq.group_columns(n);
        let top = f32::from(grid.spec().top());
        let mut w: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
        (0..n).filter(|&i| h[i * n + i] == 0.0).for_each(|i| {
            w.iter_mut().skip(i).step_by(n).for_each(|w| *w = 0.0);
        });
        let mut codes = vec![0; w.len()];
        for &q in order {
            let q = q as usize;
            let pivot = inverse[q * n + q];
            for (row, w) in w.chunks_exact_mut(n).enumerate() {
                let line = grid.line(row, q / step);
                let code = line.code(w[q] as f32, top);
                codes[row * n + q] = code as u8;
                let e = (w[q] - f64::from(line.value(code))) / pivot;
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
            let factor = Factor::new(m).unwrap();
            let fed = gptq(&weights, &grid, &factor).unwrap();
            assert_eq!(fed.codes, plain(&weights, &grid, &h, factor.order()), "{rows} x {n}, {bits} bits");
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
        let fed = gptq(&weights, &grid, &Factor::new(m.clone()).unwrap()).unwrap();
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
                (gptq(&weights, &grid, &Factor::new(moments(n, 400, 0)).unwrap()).unwrap(), grid)
            })
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5));
        let grid = Grid::min_max(&weights[..n], n, spec).unwrap();
        assert!(gptq(&weights, &grid, &Factor::new(moments(n, 20, 0)).unwrap()).is_err());
    }
}
