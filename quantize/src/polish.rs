//! After error feedback: grids fitted anew to the codes, and codes to the grids, one coordinate at a time.
//!
//! ```text
//! d = w - value, v = d H                        the error d H d^T never grows
//! a group:   scale and offset by least squares under H, codes held        then rounded to what is stored
//! a code:    the one nearest to value_k + v_k / H_kk, all others held     by falling h, as in feedback
//! ```
//!
//! Feedback finds codes for grids that were fitted to other codes, and looks ahead only: each of these steps looks at all
//! columns. (Coordinate descent as in Behdin et al., "QuantEase", 2023, with the grids among the coordinates.)

mod shake;

use llmpress_calibrate::{Factor, Moments};
use llmpress_kernels::cpu::{PANEL, multiply};
use rayon::prelude::*;

pub(crate) use shake::{Shaking, shake};

use crate::line::Line;
use crate::{Grid, ZeroPoint};

/// Rows of a task.
const ROWS: usize = 16;

/// A damped Hessian, in panels of columns for products and in rows for single updates.
pub(crate) struct Damped<'a> {
    n: usize,
    rows: &'a [f32],
    panels: Vec<f32>,
    damp: f32,
    order: &'a [u32],
    dead: &'a [bool],
}

impl<'a> Damped<'a> {
    /// Of closed moments, as they were factored. `None` where they are not full.
    pub(crate) fn new(moments: &'a Moments, factor: &'a Factor) -> Option<Self> {
        let rows = moments.full()?;
        let n = moments.features();
        let mut panels = vec![0.0f32; n * n];
        panels.par_chunks_mut((PANEL * n).max(1)).enumerate().for_each(|(at, panel)| {
            let width = panel.len() / n;
            for (to, row) in panel.chunks_exact_mut(width).zip(rows.chunks_exact(n)) {
                to.copy_from_slice(&row[at * PANEL..][..width]);
            }
        });
        Some(Self { n, rows, panels, damp: factor.damp() as f32, order: factor.order(), dead: factor.dead() })
    }

    /// `out[r] = x[r][columns] H[columns, ..]`, without the damping, for rows `x` of n.
    fn times(&self, x: &[f32], columns: std::ops::Range<usize>, out: &mut [f32]) {
        let n = self.n;
        let count = x.len() / n;
        let mut products = [0.0f32; ROWS * PANEL];
        for (at, panel) in self.panels.chunks(PANEL * n).enumerate() {
            let width = panel.len() / n;
            let products = &mut products[..count * width];
            let panel = &panel[columns.start * width..columns.end * width];
            multiply(&x[columns.start..], n, panel, width, products);
            for (out, products) in out.chunks_exact_mut(n).zip(products.chunks_exact(width)) {
                out[at * PANEL..][..width].copy_from_slice(products);
            }
        }
    }

    /// The error of each row where `values` are in place of `weights`, rows of n.
    pub(crate) fn errors(&self, weights: &[f32], values: &[f32]) -> Vec<f64> {
        let n = self.n;
        let tasks = weights.par_chunks(ROWS * n).zip(values.par_chunks(ROWS * n));
        let errors = tasks.flat_map_iter(|(weights, values)| {
            let mut d = vec![0.0f32; weights.len()];
            for (at, (d, (w, value))) in d.iter_mut().zip(weights.iter().zip(values)).enumerate() {
                *d = if self.dead[at % n] { -value } else { w - value };
            }
            let mut v = vec![0.0f32; weights.len()];
            self.times(&d, 0..n, &mut v);
            let rows = d.chunks_exact(n).zip(v.chunks_exact(n));
            let errors = rows.map(|(d, v)| {
                let terms = d.iter().zip(v);
                terms.map(|(&d, &v)| f64::from(d) * f64::from(v + self.damp * d)).sum::<f64>()
            });
            errors.collect::<Vec<f64>>()
        });
        errors.collect()
    }

    fn diagonal(&self, k: usize) -> f32 {
        self.rows[k * self.n + k] + self.damp
    }
}

/// Improves codes and grids in place, so many rounds. Returns the error under the damped Hessian.
pub(crate) fn polish(
    weights: &[f32],
    grid: &mut Grid,
    codes: &mut [u8],
    h: &Damped<'_>,
    rounds: usize,
) -> f64 {
    let n = h.n;
    let spec = *grid.spec();
    let step = spec.abq.group_columns(n);
    let groups = spec.abq.groups(n);
    let top = f32::from(spec.top());
    let rounding = grid.rounding();
    // H 1 of each group: what moving an offset does.
    let ones: Vec<f32> = {
        let mut all = vec![0.0; groups * n];
        all.par_chunks_exact_mut(n).enumerate().for_each(|(g, out)| {
            let one = vec![1.0; n];
            h.times(&one, g * step..(g * step + step).min(n), out);
        });
        all
    };
    let tasks = weights
        .par_chunks(ROWS * n)
        .zip(codes.par_chunks_mut(ROWS * n))
        .zip(grid.lines_mut().par_chunks_mut(ROWS * groups));
    let errors: Vec<f64> = tasks
        .map(|((weights, codes), lines)| {
            let count = weights.len() / n;
            // Differences, their gradients, codes as numbers, H times those.
            let mut d = vec![0.0f32; count * n];
            let mut v = vec![0.0f32; count * n];
            let mut q = vec![0.0f32; count * n];
            let mut hq = vec![0.0f32; count * n];
            let differences = |d: &mut [f32], codes: &[u8], lines: &[Line]| {
                for r in 0..count {
                    for k in 0..n {
                        let w = if h.dead[k] { 0.0 } else { weights[r * n + k] };
                        d[r * n + k] = w - lines[r * groups + k / step].value(f32::from(codes[r * n + k]));
                    }
                }
            };
            differences(&mut d, codes, lines);
            h.times(&d, 0..n, &mut v);
            v.iter_mut().zip(&d).for_each(|(v, d)| *v += h.damp * d);
            for _ in 0..rounds {
                for g in 0..groups {
                    let columns = g * step..(g * step + step).min(n);
                    for (q, code) in q.iter_mut().zip(&*codes) {
                        *q = f32::from(*code);
                    }
                    h.times(&q, columns.clone(), &mut hq);
                    for r in 0..count {
                        let row = r * n..(r + 1) * n;
                        let line = &mut lines[r * groups + g];
                        let fit = Fit {
                            q: &q[row.clone()],
                            hq: &hq[row.clone()],
                            h1: &ones[g * n..(g + 1) * n],
                            damp: h.damp,
                            columns: columns.clone(),
                        };
                        fit.apply(line, spec.zero, rounding, &mut d[row.clone()], &mut v[row]);
                    }
                }
                for r in 0..count {
                    let (d, v) = (&mut d[r * n..(r + 1) * n], &mut v[r * n..(r + 1) * n]);
                    for &k in h.order {
                        let k = k as usize;
                        if h.dead[k] {
                            continue;
                        }
                        let line = lines[r * groups + k / step];
                        let code = f32::from(codes[r * n + k]);
                        let value = line.value(code);
                        let better = line.code(value + v[k] / h.diagonal(k), top);
                        if better != code {
                            let change = line.value(better) - value;
                            codes[r * n + k] = better as u8;
                            d[k] -= change;
                            v.iter_mut().zip(&h.rows[k * n..(k + 1) * n]).for_each(|(v, h)| *v -= change * h);
                            v[k] -= change * h.damp;
                        }
                    }
                }
            }
            // Afresh: updates round.
            differences(&mut d, codes, lines);
            h.times(&d, 0..n, &mut v);
            d.iter().zip(&v).map(|(&d, &v)| f64::from(d) * f64::from(v + h.damp * d)).sum::<f64>()
        })
        .collect();
    errors.iter().sum()
}

/// A group of a row whose line is fitted to its codes.
struct Fit<'a> {
    q: &'a [f32],
    hq: &'a [f32],
    h1: &'a [f32],
    damp: f32,
    columns: std::ops::Range<usize>,
}

impl Fit<'_> {
    /// Takes the line that the normal equations give, rounded to what is stored, where it is better.
    fn apply(
        &self,
        line: &mut Line,
        zero: ZeroPoint,
        rounding: crate::rounding::Rounding,
        d: &mut [f32],
        v: &mut [f32],
    ) {
        let z = f64::from(line.zero);
        let (mut qhq, mut qh1, mut h11, mut qv, mut sv) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for k in self.columns.clone() {
            let q = f64::from(self.q[k]);
            let (hq, h1) =
                (f64::from(self.hq[k]) + f64::from(self.damp) * q, f64::from(self.h1[k] + self.damp));
            qhq += q * hq;
            qh1 += q * h1;
            h11 += h1;
            qv += q * f64::from(v[k]);
            sv += f64::from(v[k]);
        }
        // Of codes counted from zero.
        let (qhq, qh1, qv) = (qhq - 2.0 * z * qh1 + z * z * h11, qh1 - z * h11, qv - z * sv);
        let (ds, dt) = match zero {
            ZeroPoint::Real => {
                let spread = qhq * h11 - qh1 * qh1;
                ((qv * h11 - sv * qh1) / spread, (sv * qhq - qv * qh1) / spread)
            }
            _ => (qv / qhq, 0.0),
        };
        let scale = f64::from(line.scale) + ds;
        let next = rounding.of(match zero {
            ZeroPoint::Real => Line::real(scale as f32, (f64::from(line.offset) + dt) as f32),
            _ => Line::on_code(scale as f32, line.zero as u8),
        });
        if !next.is_sound() || next == *line {
            return;
        }
        let ds = f64::from(next.scale) - f64::from(line.scale);
        let dt = f64::from(next.offset) - f64::from(line.offset);
        let gain = 2.0 * (ds * qv + dt * sv) - (ds * ds * qhq + 2.0 * ds * dt * qh1 + dt * dt * h11);
        if gain <= 0.0 || !gain.is_finite() {
            return;
        }
        *line = next;
        // value += ds (q - z) + dt
        let (ds, dt) = (ds as f32, (dt - ds * z) as f32);
        for (k, v) in v.iter_mut().enumerate() {
            *v -= ds * self.hq[k] + dt * self.h1[k];
        }
        for k in self.columns.clone() {
            let change = ds * self.q[k] + dt;
            d[k] -= change;
            v[k] -= self.damp * change;
        }
    }
}
