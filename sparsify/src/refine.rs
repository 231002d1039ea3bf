//! After error feedback: quads settled anew, one after the other, all others held.
//!
//! ```text
//! d = target - w, v = d H                                     the error d H d^T never grows
//! a quad q:  t = w_q + v_q G, G = H_qq^-1                     what its four would be, were none to be dropped
//!            dropping the two D costs t_D (G_DD)^-1 t_D^T     the cheapest of the six ways is taken
//!            the two kept become t_K - t_D (G_DD)^-1 G_DK
//! ```
//!
//! Feedback looks ahead only, and chooses two of four by what each costs alone: here each quad sees all columns, and what two
//! cost together. (Coordinate descent, with coordinates of four columns of which two are zero.)

use llmpress_calibrate::{Factor, Moments};
use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{PANEL, multiply};
use rayon::prelude::*;

use crate::quads::{MASKS, QUAD, places};

/// Rows of a task.
const ROWS: usize = 16;

/// A damped Hessian, in panels of columns for products and in rows for single updates.
pub(crate) struct Damped<'a> {
    n: usize,
    rows: &'a [f32],
    panels: Vec<f32>,
    damp: f32,
    dead: &'a [bool],
    quads: Vec<Option<Quad>>,
}

/// What settling a quad goes by.
struct Quad {
    /// G.
    inverse: [[f32; QUAD]; QUAD],
    /// For each mask the inverse of G of what it drops: first, both, second.
    dropped: [[f32; 3]; 6],
}

impl Quad {
    /// `None` where rounding has left nothing positive definite.
    fn new(h: [[f64; QUAD]; QUAD]) -> Option<Self> {
        let g = inverse(h)?;
        let mut dropped = [[0.0; 3]; 6];
        for (to, mask) in dropped.iter_mut().zip(MASKS) {
            let [a, b] = places(!mask & 0b1111);
            let determinant = g[a][a] * g[b][b] - g[a][b] * g[a][b];
            if determinant <= 0.0 || !determinant.is_finite() {
                return None;
            }
            *to = [g[b][b], -g[a][b], g[a][a]].map(|x| (x / determinant) as f32);
        }
        Some(Self { inverse: g.map(|row| row.map(|x| x as f32)), dropped })
    }

    /// The new weights of a quad, and what it keeps of them: the cheapest of all ways, or of one.
    fn settle(&self, t: [f32; QUAD], mask: u8, rechoose: bool) -> ([f32; QUAD], u8) {
        let cost = |at: usize| {
            let [a, b] = places(!MASKS[at] & 0b1111);
            let [aa, ab, bb] = self.dropped[at];
            let pulled = [t[a] * aa + t[b] * ab, t[a] * ab + t[b] * bb];
            (t[a] * pulled[0] + t[b] * pulled[1], pulled)
        };
        let now = MASKS.iter().position(|m| *m == mask).unwrap_or(0);
        let mut best = (now, cost(now));
        if rechoose {
            for at in 0..MASKS.len() {
                let found = cost(at);
                // What costs the same stays.
                if found.0 < best.1.0 {
                    best = (at, found);
                }
            }
        }
        let (at, (_, pulled)) = best;
        let [a, b] = places(!MASKS[at] & 0b1111);
        let mut new = [0.0; QUAD];
        for k in places(MASKS[at]) {
            new[k] = t[k] - pulled[0] * self.inverse[a][k] - pulled[1] * self.inverse[b][k];
        }
        (new, MASKS[at])
    }
}

/// The inverse of a symmetric matrix by elimination; `None` where it is not positive definite.
fn inverse(mut a: [[f64; QUAD]; QUAD]) -> Option<[[f64; QUAD]; QUAD]> {
    let mut inverse = [[0.0; QUAD]; QUAD];
    for (i, row) in inverse.iter_mut().enumerate() {
        row[i] = 1.0;
    }
    for i in 0..QUAD {
        let pivot = a[i][i];
        if pivot <= 0.0 || !pivot.is_finite() {
            return None;
        }
        a[i].iter_mut().chain(&mut inverse[i]).for_each(|x| *x /= pivot);
        let (pivot, pivot_inverse) = (a[i], inverse[i]);
        for r in (0..QUAD).filter(|&r| r != i) {
            let factor = a[r][i];
            a[r].iter_mut().zip(pivot).for_each(|(x, p)| *x -= factor * p);
            inverse[r].iter_mut().zip(pivot_inverse).for_each(|(x, p)| *x -= factor * p);
        }
    }
    Some(inverse)
}

impl<'a> Damped<'a> {
    /// Of closed moments, as they were factored.
    ///
    /// # Errors
    /// Moments that are not full.
    pub(crate) fn new(moments: &'a Moments, factor: &'a Factor) -> Result<Self> {
        let Some(rows) = moments.full() else {
            return Err(Error::Invalid("going over quads again needs the whole Hessian".to_owned()));
        };
        let n = moments.features();
        let mut panels = vec![0.0f32; n * n];
        panels.par_chunks_mut((PANEL * n).max(1)).enumerate().for_each(|(at, panel)| {
            let width = panel.len() / n;
            for (to, row) in panel.chunks_exact_mut(width).zip(rows.chunks_exact(n)) {
                to.copy_from_slice(&row[at * PANEL..][..width]);
            }
        });
        let damp = factor.damp();
        let quad = |first: usize| {
            Quad::new(std::array::from_fn(|i| {
                std::array::from_fn(|j| {
                    f64::from(rows[(first + i) * n + first + j]) + if i == j { damp } else { 0.0 }
                })
            }))
        };
        let quads = (0..n).step_by(QUAD).map(quad).collect();
        Ok(Self { n, rows, panels, damp: damp as f32, dead: factor.dead(), quads })
    }

    /// `v = d H` with the damping, for rows of n.
    fn times(&self, d: &[f32], v: &mut [f32]) {
        let n = self.n;
        let mut products = [0.0f32; ROWS * PANEL];
        for (at, panel) in self.panels.chunks(PANEL * n).enumerate() {
            let width = panel.len() / n;
            let products = &mut products[..d.len() / n * width];
            multiply(d, n, panel, width, products);
            for (v, products) in v.chunks_exact_mut(n).zip(products.chunks_exact(width)) {
                v[at * PANEL..][..width].copy_from_slice(products);
            }
        }
        v.iter_mut().zip(d).for_each(|(v, d)| *v += self.damp * d);
    }

    /// `d = target - w`; the target of a dead column is zero.
    fn away(&self, target: &[f32], w: &[f32], d: &mut [f32]) {
        for (at, (d, (target, w))) in d.iter_mut().zip(target.iter().zip(w)).enumerate() {
            *d = if self.dead[at % self.n] { -w } else { target - w };
        }
    }
}

/// Goes over all quads so many times, in place: `weights` and `masks` are as error feedback left them, `target` is what it went
/// by. Returns the error under the damped Hessian before and after.
pub(crate) fn refine(
    target: &[f32],
    weights: &mut [f32],
    masks: &mut [u8],
    h: &Damped<'_>,
    (sweeps, rechoose): (usize, bool),
) -> (f64, f64) {
    let n = h.n;
    let tasks = target
        .par_chunks(ROWS * n)
        .zip(weights.par_chunks_mut(ROWS * n))
        .zip(masks.par_chunks_mut(ROWS * n / QUAD));
    let errors: Vec<(f64, f64)> = tasks
        .map(|((target, w), masks)| {
            let mut d = vec![0.0f32; w.len()];
            let mut v = vec![0.0f32; w.len()];
            let error = |d: &mut [f32], v: &mut [f32], w: &[f32]| -> f64 {
                h.away(target, w, d);
                h.times(d, v);
                d.iter().zip(&*v).map(|(&d, &v)| f64::from(d) * f64::from(v)).sum()
            };
            let before = error(&mut d, &mut v, w);
            let mut after = before;
            for _ in 0..sweeps {
                for (at, quad) in h.quads.iter().enumerate() {
                    let Some(quad) = quad else { continue };
                    let rows = w.chunks_exact_mut(n).zip(v.chunks_exact_mut(n));
                    for ((w, v), masks) in rows.zip(masks.chunks_exact_mut(n / QUAD)) {
                        sweep(quad, at, (w, v), &mut masks[at], (h, rechoose));
                    }
                }
                // Rounding adds up in v: it is made anew.
                after = error(&mut d, &mut v, w);
            }
            (before, after)
        })
        .collect();
    errors.iter().fold((0.0, 0.0), |sum, error| (sum.0 + error.0, sum.1 + error.1))
}

/// One quad of a row.
fn sweep(
    quad: &Quad,
    at: usize,
    (w, v): (&mut [f32], &mut [f32]),
    mask: &mut u8,
    (h, rechoose): (&Damped<'_>, bool),
) {
    let columns = at * QUAD..(at + 1) * QUAD;
    let now: [f32; QUAD] = std::array::from_fn(|p| w[columns.start + p]);
    let pull: [f32; QUAD] = std::array::from_fn(|p| v[columns.start + p]);
    let t = std::array::from_fn(|p| quad.inverse[p].iter().zip(&pull).fold(now[p], |t, (g, v)| t + g * v));
    let (new, kept) = quad.settle(t, *mask, rechoose);
    if new.iter().any(|w| !w.is_finite()) {
        return;
    }
    *mask = kept;
    for (p, column) in columns.enumerate() {
        let by = new[p] - now[p];
        if by == 0.0 {
            continue;
        }
        w[column] = new[p];
        let row = &h.rows[column * h.n..][..h.n];
        v.iter_mut().zip(row).for_each(|(v, h)| *v -= by * h);
        v[column] -= by * h.damp;
    }
}

#[cfg(test)]
mod tests {
    use llmpress_calibrate::Order;

    use super::*;
    use crate::sparsegpt::sparsegpt;
    use crate::testing::{moments, noise};

    #[test]
    fn a_quad_is_settled_as_the_best_of_all_least_squares() {
        for seed in 0..20 {
            // H = A A^T.
            let a: Vec<f32> = (0..24).map(|i| noise(seed, i)).collect();
            let h: [[f64; 4]; 4] = std::array::from_fn(|i| {
                std::array::from_fn(|j| {
                    (0..6).map(|k| f64::from(a[i * 6 + k]) * f64::from(a[j * 6 + k])).sum::<f64>()
                        + if i == j { 0.1 } else { 0.0 }
                })
            });
            let t: [f32; 4] = std::array::from_fn(|p| noise(seed + 100, p));
            let error = |w: &[f32; 4]| -> f64 {
                let d: Vec<f64> = (0..4).map(|p| f64::from(w[p] - t[p])).collect();
                (0..4).flat_map(|i| (0..4).map(move |j| (i, j))).map(|(i, j)| d[i] * h[i][j] * d[j]).sum()
            };
            // The least squares of a pair by its two equations.
            let best_of = |mask: u8| {
                let [a, b] = places(mask);
                let right = |p: usize| (0..4).map(|j| h[p][j] * f64::from(t[j])).sum::<f64>();
                let det = h[a][a] * h[b][b] - h[a][b] * h[a][b];
                let mut w = [0.0; 4];
                w[a] = ((right(a) * h[b][b] - h[a][b] * right(b)) / det) as f32;
                w[b] = ((right(b) * h[a][a] - h[a][b] * right(a)) / det) as f32;
                w
            };
            let quad = Quad::new(h).unwrap();
            let (found, mask) = quad.settle(t, 0b0011, true);
            let least = MASKS.iter().map(|m| error(&best_of(*m))).fold(f64::INFINITY, f64::min);
            assert!((error(&found) - least).abs() < 1e-5, "{} {least}", error(&found));
            assert!((0..4).all(|p| mask >> p & 1 == 1 || found[p].to_bits() == 0));
            let (held, mask) = quad.settle(t, 0b1001, false);
            assert_eq!(mask, 0b1001);
            assert!(held.iter().zip(best_of(0b1001)).all(|(a, b)| (a - b).abs() < 1e-4));
        }
        assert!(Quad::new([[0.0; 4]; 4]).is_none());
    }

    #[test]
    fn the_error_falls_in_every_sweep_and_below_that_of_held_masks() {
        for (rows, n, dead) in [(1, 4, 0), (19, 100, 2), (33, 132, 0)] {
            let weights: Vec<f32> = (0..rows * n).map(|i| noise(77, i) * noise(78, i)).collect();
            let moments = moments(n, 3 * n + 5, dead);
            let factor = Factor::new(&moments, Order::LeftToRight).unwrap();
            let damped = Damped::new(&moments, &factor).unwrap();
            let start = sparsegpt(&weights, &factor).unwrap();
            let of = |sweeps, rechoose| {
                let (mut w, mut masks) = (start.weights.clone(), start.masks.clone());
                let errors = refine(&weights, &mut w, &mut masks, &damped, (sweeps, rechoose));
                assert!(masks.iter().all(|mask| mask.count_ones() == 2));
                for (quad, mask) in w.chunks_exact(QUAD).zip(&masks) {
                    assert!((0..QUAD).all(|p| mask >> p & 1 == 1 || quad[p].to_bits() == 0));
                }
                errors
            };
            let (before, held) = of(20, false);
            assert!((before / start.error - 1.0).abs() < 1e-3, "{before} {}", start.error);
            let mut last = before;
            for sweeps in 1..6 {
                let (_, now) = of(sweeps, true);
                assert!(now <= last * (1.0 + 1e-5), "{sweeps}: {now} {last}");
                last = now;
            }
            let (_, best) = of(20, true);
            assert!(held <= before && best <= last && (n == 4 || best < held), "{before} {held} {best}");
        }
    }

    #[test]
    fn sweeps_are_the_same_bits_on_any_number_of_threads() {
        let (rows, n) = (37, 100);
        let weights: Vec<f32> = (0..rows * n).map(|i| noise(5, i)).collect();
        let moments = moments(n, 400, 1);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let factor = Factor::new(&moments, Order::LeftToRight).unwrap();
                let mut found = sparsegpt(&weights, &factor).unwrap();
                let damped = Damped::new(&moments, &factor).unwrap();
                let errors = refine(&weights, &mut found.weights, &mut found.masks, &damped, (4, true));
                (errors, found)
            })
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5));
    }
}
