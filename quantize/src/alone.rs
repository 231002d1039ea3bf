//! A matrix learned by itself: by the second moments of what it multiplies, so that no text is read again.
//!
//! ```text
//! loss of a row: d H d^T, d = w - value
//! a round: codes moved by chance (shake.rs), codes and lines settled again (polish.rs)    rounds begin ever less hot
//! each row by itself keeps the best that any round came to
//! ```
//!
//! For experts, whose tokens would change while they are learned together, and for matrices that quantise what they share to
//! other bits each. Nothing is held back to judge by: the moments are of all tokens, damped as for error feedback.
//!
//! The loss is a quadratic of codes, and polishing has left where no single one gains. On tinylm at 2 bits 240 sweeps by chance
//! take 9 % off it, 400 steps down its derivative (places, scales and offsets as `latent.rs` has them) less than 1 %.

use llmpress_calibrate::Shares;

use crate::Grid;
use crate::line::Line;
use crate::polish::{Damped, Shaking, polish, shake};

/// Sweeps of a round at most.
const SWEEPS: u32 = 30;
/// The heat of the first round. Measured on tinylm: 1 takes off a third as much as 6, 16 hardly anything.
const HEAT: f32 = 6.0;
/// Rounds of polishing at the end of each.
const ROUNDS: usize = 2;

/// How a matrix is to be learned by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alone {
    /// Sweeps over all codes.
    pub(crate) steps: u32,
    /// What chance begins with.
    pub(crate) seed: u64,
    /// What all of it counts for in progress.
    pub(crate) effort: u64,
}

/// The best of each row so far.
struct Best {
    errors: Vec<f64>,
    codes: Vec<u8>,
    lines: Vec<Line>,
}

impl Best {
    /// Takes rows that are better.
    fn take(&mut self, errors: &[f64], row: impl Fn(usize, &mut [u8], &mut [Line])) {
        let rows = self.errors.len().max(1);
        let (cols, groups) = ((self.codes.len() / rows).max(1), (self.lines.len() / rows).max(1));
        let all = self.errors.iter_mut().zip(errors);
        let all = all.zip(self.codes.chunks_exact_mut(cols)).zip(self.lines.chunks_exact_mut(groups));
        for (at, (((best, error), codes), lines)) in all.enumerate() {
            // NaN is not.
            if error < best {
                *best = *error;
                row(at, codes, lines);
            }
        }
    }

    fn error(&self) -> f64 {
        self.errors.iter().sum()
    }
}

/// Learns a matrix on its grid towards `weights`, from the codes that error feedback and polishing left. Returns the error
/// under the damped Hessian before and after: the latter is never the greater.
pub(crate) fn learn(
    weights: &[f32],
    grid: &mut Grid,
    codes: &mut Vec<u8>,
    h: &Damped<'_>,
    alone: Alone,
    progress: &mut dyn FnMut(u64),
) -> (f64, f64) {
    let errors = h.errors(weights, &grid.values(codes));
    let mut best = Best { errors, codes: std::mem::take(codes), lines: grid.lines_mut().to_vec() };
    let before = best.error();
    let (cols, groups) = (grid.cols(), grid.spec().abq.groups(grid.cols()));
    let mut shares = Shares::new(alone.effort, u64::from(alone.steps));
    for first in (0..alone.steps).step_by(SWEEPS as usize) {
        let sweeps = SWEEPS.min(alone.steps - first);
        let heat = HEAT * (1.0 - first as f32 / alone.steps as f32);
        let mut codes = best.codes.clone();
        grid.lines_mut().copy_from_slice(&best.lines);
        let seed = alone.seed.wrapping_add(u64::from(first).wrapping_mul(0xD6E8_FEB8_6659_FD93));
        shake(weights, grid, &mut codes, h, Shaking { heat, sweeps, seed });
        polish(weights, grid, &mut codes, h, ROUNDS);
        let errors = h.errors(weights, &grid.values(&codes));
        let lines = grid.lines_mut().to_vec();
        best.take(&errors, |row, to, to_lines| {
            to.copy_from_slice(&codes[row * cols..][..cols]);
            to_lines.copy_from_slice(&lines[row * groups..][..groups]);
        });
        progress((0..sweeps).map(|_| shares.take()).sum());
    }
    grid.lines_mut().copy_from_slice(&best.lines);
    let after = best.error();
    *codes = best.codes;
    (before, after)
}

#[cfg(test)]
mod tests {
    use llmpress_calibrate::{Extent, Factor, Moments, Order};
    use llmpress_formats::encoding::abq::Abq;
    use llmpress_model::Panels;

    use super::*;
    use crate::{Rung, Spec, ZeroPoint, gptq};

    fn noise(seed: usize, i: usize) -> f32 {
        let x = (i as u64 * 0x9E37_79B9 + seed as u64 * 0x85EB_CA6B + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        ((x ^ x >> 31) as u32 as f32) / (1u64 << 31) as f32 - 1.0
    }

    /// Features depend on each other, and some are always zero.
    fn moments(features: usize, tokens: usize) -> Moments {
        let mut x = Panels::zeros(features, tokens);
        for t in 0..tokens {
            let shared = noise(t, 9999);
            let of = |f: usize| (noise(t, f) + 0.7 * shared) * (0.2 + (f % 11) as f32);
            x.set_token(t, (0..features).map(|f| if f % 31 == 7 { 0.0 } else { of(f) }));
        }
        let mut moments = Moments::new(features, Extent::Full).unwrap();
        moments.add(&x).unwrap();
        moments.close()
    }

    fn fed(spec: Spec, weights: &[f32], moments: &Moments) -> (Factor, Grid, Vec<u8>) {
        let diagonal: Vec<f32> = moments.diagonal().iter().map(|&h| h as f32).collect();
        let mut grid = Grid::search(weights, moments.features(), spec, Some(&diagonal)).unwrap();
        let factor = Factor::new(moments, Order::Falling).unwrap();
        let mut codes = gptq(weights, &grid, &factor).unwrap().codes;
        polish(weights, &mut grid, &mut codes, &Damped::new(moments, &factor).unwrap(), 4);
        (factor, grid, codes)
    }

    fn spec(bits: u8, group: Option<u32>, zero: ZeroPoint) -> Spec {
        let abq = Abq { group_size: group, ..Abq::new(bits) };
        Spec { abq, zero, rung: Rung::Gptq, learn: None }
    }

    #[test]
    fn the_loss_falls_in_every_row_or_the_row_stays_and_all_progress_is_told() {
        for (rows, n, spec) in [
            (1, 1, spec(4, None, ZeroPoint::Real)),
            (19, 100, spec(2, None, ZeroPoint::Real)),
            (33, 130, spec(2, Some(64), ZeroPoint::Integer)),
            (20, 64, spec(3, Some(32), ZeroPoint::Symmetric)),
        ] {
            let weights: Vec<f32> = (0..rows * n).map(|i| noise(77, i) * noise(78, i)).collect();
            let moments = moments(n, 3 * n + 5);
            let (factor, mut grid, mut codes) = fed(spec, &weights, &moments);
            let damped = Damped::new(&moments, &factor).unwrap();
            let error = |grid: &Grid, codes: &[u8]| damped.errors(&weights, &grid.values(codes));
            let start = error(&grid, &codes);
            let mut told = 0;
            let alone = Alone { steps: 70, seed: 1, effort: 1007 };
            let (before, after) = learn(&weights, &mut grid, &mut codes, &damped, alone, &mut |n| told += n);
            let end = error(&grid, &codes);
            assert_eq!((before, told), (start.iter().sum(), 1007));
            assert_eq!(after, end.iter().sum::<f64>(), "what is said is what is stored");
            assert!(end.iter().zip(&start).all(|(end, start)| end <= start));
            assert!(n == 1 || after < 0.99 * before, "{before} {after}");
            grid.pack(&codes).unwrap();
        }
    }

    #[test]
    fn learning_is_the_same_bits_on_any_number_of_threads() {
        let (rows, n) = (37, 100);
        let weights: Vec<f32> = (0..rows * n).map(|i| noise(5, i)).collect();
        let moments = moments(n, 400);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (factor, mut grid, mut codes) =
                    fed(spec(2, Some(32), ZeroPoint::Real), &weights, &moments);
                let damped = Damped::new(&moments, &factor).unwrap();
                let alone = Alone { steps: 20, seed: 0, effort: 0 };
                let errors = learn(&weights, &mut grid, &mut codes, &damped, alone, &mut |_| ());
                (errors, grid, codes)
            })
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5));
    }
}
