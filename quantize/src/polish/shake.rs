//! Codes moved by chance, so that they leave where no single one could move for the better.
//!
//! ```text
//! a sweep: each code one up or down, by chance       taken where the error grows by less than heat x chance
//! heat: a multiple of the row's error a column, down to nothing with the last sweep
//! ```
//!
//! (Threshold accepting, Dueck and Scheuer, 1990: annealing that takes no logarithm, so that it is the same bits anywhere.)

use rayon::prelude::*;

use super::{Damped, ROWS};
use crate::Grid;

/// How codes are moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shaking {
    /// The heat of the first sweep.
    pub(crate) heat: f32,
    /// How often each code is tried.
    pub(crate) sweeps: u32,
    /// What chance begins with.
    pub(crate) seed: u64,
}

/// Moves codes in place, lines held; the error under the damped Hessian may be greater in the end.
pub(crate) fn shake(weights: &[f32], grid: &Grid, codes: &mut [u8], h: &Damped<'_>, how: Shaking) {
    let n = h.n;
    let tasks = weights.par_chunks(ROWS * n).zip(codes.par_chunks_mut(ROWS * n)).enumerate();
    tasks.for_each(|(task, (weights, codes))| {
        let step = grid.spec().abq.group_columns(n);
        let value =
            |row: usize, k: usize, code: u8| grid.line(task * ROWS + row, k / step).value(f32::from(code));
        let mut d = vec![0.0f32; weights.len()];
        for (at, (d, (w, code))) in d.iter_mut().zip(weights.iter().zip(&*codes)).enumerate() {
            *d = if h.dead[at % n] { 0.0 } else { *w } - value(at / n, at % n, *code);
        }
        let mut v = vec![0.0f32; weights.len()];
        h.times(&d, 0..n, &mut v);
        v.iter_mut().zip(&d).for_each(|(v, d)| *v += h.damp * d);
        let rows = codes.chunks_exact_mut(n).zip(v.chunks_exact_mut(n)).zip(d.chunks_exact(n));
        for (row, ((codes, v), d)) in rows.enumerate() {
            let error: f64 = d.iter().zip(&*v).map(|(d, v)| f64::from(*d) * f64::from(*v)).sum();
            let mut chance = Chance::new(how.seed, (task * ROWS + row) as u64);
            for sweep in 0..how.sweeps {
                let share = 1.0 - f64::from(sweep) / f64::from(how.sweeps);
                let heat = (f64::from(how.heat) * share * error / n as f64) as f32;
                for &k in h.order {
                    let k = k as usize;
                    let (up, share) = chance.next();
                    let next = if up { codes[k].checked_add(1) } else { codes[k].checked_sub(1) };
                    let Some(next) = next.filter(|next| *next <= grid.spec().top() && !h.dead[k]) else {
                        continue;
                    };
                    let change = value(row, k, next) - value(row, k, codes[k]);
                    let growth = change * (change * h.diagonal(k) - 2.0 * v[k]);
                    if growth < heat * share {
                        codes[k] = next;
                        v.iter_mut().zip(&h.rows[k * n..(k + 1) * n]).for_each(|(v, h)| *v -= change * h);
                        v[k] -= change * h.damp;
                    }
                }
            }
        }
    });
}

/// Chance of a row (xorshift, Marsaglia, 2003).
struct Chance(u64);

impl Chance {
    fn new(seed: u64, row: u64) -> Self {
        // Neighbours are to differ, and none may be 0 (the finalizer of SplitMix64, Steele et al., 2014).
        let mut x = seed.wrapping_add(row.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self((x ^ (x >> 31)) | 1)
    }

    /// Yes or no, and a share from 0 on and below 1.
    fn next(&mut self) -> (bool, f32) {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 63 == 1, ((self.0 >> 32) & 0xff_ffff) as f32 / (1u32 << 24) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_even_and_differs_by_row_and_seed() {
        let mut chance = Chance::new(0, 0);
        let drawn: Vec<(bool, f32)> = (0..10_000).map(|_| chance.next()).collect();
        let up = drawn.iter().filter(|(up, _)| *up).count();
        let mean = drawn.iter().map(|(_, share)| share).sum::<f32>() / 10_000.0;
        assert!((4800..5200).contains(&up) && (mean - 0.5).abs() < 0.02, "{up} {mean}");
        assert!(drawn.iter().all(|(_, share)| (0.0..1.0).contains(share)));
        let first = |seed, row| Chance::new(seed, row).next();
        assert!(first(0, 0) != first(0, 1) && first(0, 0) != first(1, 0));
    }
}
