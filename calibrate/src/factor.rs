//! The factor that error feedback goes by: U, upper triangular, with U^T U = (H + damping)^-1 (Frantar et al., "GPTQ",
//! section 3.3, step 3: the Cholesky form).
//!
//! ```text
//! H, columns in the order in which they are settled --reversed--> A = L L^T, blocked --> L^-1, a run of columns at a time --reversed--> U
//! ```
//!
//! Turning the order round makes U the inverse of one Cholesky factor: the inverse of H is never formed. In double
//! precision; each block is the work of one task, so that the bits do not depend on the number of threads.

use std::borrow::Borrow;

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{DOUBLE_PANEL, multiply_double};
use rayon::prelude::*;

use crate::Moments;

/// Rows and columns of a block: whole panels.
const BLOCK: usize = 4 * DOUBLE_PANEL;
/// What is added to the diagonal, of its mean, at first.
pub const DAMPING: f64 = 0.01;
/// The most that is tried: ten times more each time.
const MOST_DAMPING: f64 = 10.0;

/// A column run of a matrix: rows of [`DOUBLE_PANEL`] values.
type Panel = [f64; DOUBLE_PANEL];

/// In which order columns are settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By falling diagonal of the Hessian: what matters most first, while there is most left to make up for it.
    Falling,
    /// From left to right: where columns that lie side by side are settled together.
    LeftToRight,
}

/// The factor of a Hessian, its columns in the order in which they are settled.
#[derive(Clone, Debug, PartialEq)]
pub struct Factor {
    order: Vec<u32>,
    /// Of columns in `order`: `[n, n]`, upper triangular.
    upper: Vec<f32>,
    dead: Vec<bool>,
    damping: f64,
    damp: f64,
}

impl Factor {
    /// Factors the Hessian of closed moments, which must be full ones. Columns that were always zero are dead: their
    /// diagonal becomes 1, and feedback takes their weights for zero. Where rounding leaves the Hessian not positive definite
    /// the damping grows tenfold until it is.
    ///
    /// `moments` that are given away, not lent, make room for the factor.
    ///
    /// # Errors
    /// A Hessian that is not there, not finite, or not positive definite with any damping.
    pub fn new(given: impl Borrow<Moments>, in_order: Order) -> Result<Self> {
        let moments = given.borrow();
        let n = moments.features();
        let Some(h) = moments.full() else {
            return Err(Error::Invalid("error feedback needs the whole Hessian".to_owned()));
        };
        let mut diagonal: Vec<f64> = (0..n).map(|i| f64::from(h[i * n + i])).collect();
        if !h.par_iter().all(|x| x.is_finite()) {
            return Err(Error::Invalid("the Hessian is not finite".to_owned()));
        }
        let dead: Vec<bool> = diagonal.iter().map(|d| *d <= 0.0).collect();
        diagonal.iter_mut().filter(|d| **d <= 0.0).for_each(|d| *d = 1.0);
        let mut order: Vec<u32> = (0..n as u32).collect();
        if in_order == Order::Falling {
            let falling = |&a: &u32, &b: &u32| diagonal[b as usize].total_cmp(&diagonal[a as usize]);
            order.sort_by(|a, b| falling(a, b).then(a.cmp(b)));
        }
        let mean = diagonal.iter().sum::<f64>() / n.max(1) as f64;
        let mut damping = DAMPING;
        let mut a = vec![0.0f64; n * n];
        loop {
            fill(&mut a, h, &diagonal, &dead, &order, damping * mean);
            match cholesky(&mut a, n) {
                Ok(()) => break,
                Err(()) if damping < MOST_DAMPING => damping *= 10.0,
                Err(()) => {
                    return Err(Error::Invalid(format!(
                        "the Hessian is not positive definite, even with {MOST_DAMPING} of its mean diagonal added"
                    )));
                }
            }
        }
        // Room for what comes next.
        drop(given);
        let mut upper = vec![0.0f32; n * n];
        invert(&a, n, &mut upper);
        drop(a);
        transpose(&mut upper, n);
        Ok(Self { order, upper, dead, damping, damp: damping * mean })
    }

    /// Columns.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The order in which columns are settled.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// Rows of a matrix with their columns in that order; dead ones zero.
    pub fn ordered(&self, weights: &[f32]) -> Vec<f32> {
        let n = self.len().max(1);
        let mut ordered = vec![0.0f32; weights.len()];
        ordered.par_chunks_exact_mut(n).zip(weights.par_chunks_exact(n)).for_each(|(to, from)| {
            for (to, &column) in to.iter_mut().zip(&self.order) {
                *to = if self.dead[column as usize] { 0.0 } else { from[column as usize] };
            }
        });
        ordered
    }

    /// Rows whose columns are in that order with them in their own again.
    pub fn put_back<T: Copy + Default + Send + Sync>(&self, ordered: &[T]) -> Vec<T> {
        let n = self.len().max(1);
        let mut own = vec![T::default(); ordered.len()];
        own.par_chunks_exact_mut(n).zip(ordered.par_chunks_exact(n)).for_each(|(to, from)| {
            from.iter().zip(&self.order).for_each(|(value, &column)| to[column as usize] = *value);
        });
        own
    }

    /// Which columns, in their own order, were always zero.
    pub fn dead(&self) -> &[bool] {
        &self.dead
    }

    /// What was added to the diagonal, of its mean.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// What was added to the diagonal.
    pub fn damp(&self) -> f64 {
        self.damp
    }

    /// An element of U.
    pub(crate) fn at(&self, i: usize, j: usize) -> f32 {
        self.upper[i * self.order.len() + j]
    }

    /// A row of U from its diagonal on.
    pub fn row(&self, i: usize) -> &[f32] {
        let n = self.order.len();
        &self.upper[i * n + i..(i + 1) * n]
    }

    /// Bytes that making it takes at most beside the Hessian: the factor in double precision, then U.
    pub fn peak_bytes(features: usize) -> u64 {
        let square = (features as u64).saturating_mul(features as u64);
        // While A is factored the Hessian, 4 bytes, is still there; it makes room for U.
        square.saturating_mul(12)
    }
}

/// The lower half of the Hessian with its columns in the reverse of `order`, damped.
fn fill(a: &mut [f64], h: &[f32], diagonal: &[f64], dead: &[bool], order: &[u32], damp: f64) {
    let n = order.len();
    let column = |i: usize| order[n - 1 - i] as usize;
    a.par_chunks_exact_mut(n.max(1)).enumerate().for_each(|(i, row)| {
        let from = &h[column(i) * n..][..n];
        for (j, to) in row[..i].iter_mut().enumerate() {
            *to = f64::from(from[column(j)]);
        }
        if dead[column(i)] {
            row[..i].fill(0.0);
        }
        row[i] = diagonal[column(i)] + damp;
        row[i + 1..].fill(0.0);
    });
}

/// `A = L L^T` in place, in the lower half, a block of columns at a time. The blocks on the diagonal become their
/// inverses.
fn cholesky(a: &mut [f64], n: usize) -> std::result::Result<(), ()> {
    let mut inverse = Vec::new();
    let mut panels: Vec<Panel> = Vec::new();
    for first in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - first);
        let (above, below) = a.split_at_mut((first + width) * n);
        let corner = &mut above[first * n + first..];
        factor_corner(corner, width, n)?;
        invert_corner(corner, width, n);
        // Below it: X = A L^-T.
        inverse.clear();
        for from in (0..width).step_by(DOUBLE_PANEL) {
            inverse.extend((0..width).map(|k| {
                std::array::from_fn(|j| match from + j {
                    j if j < width && k <= j => corner[j * n + k],
                    _ => 0.0,
                })
            }));
        }
        below.par_chunks_mut(BLOCK * n).for_each(|rows| {
            let mut x = [[0.0; DOUBLE_PANEL]; BLOCK * BLOCK / DOUBLE_PANEL];
            let height = rows.len() / n;
            for (panel, x) in inverse.chunks_exact(width).zip(x.chunks_mut(height)) {
                multiply_double(&rows[first..], n, panel, x);
            }
            for (at, x) in x.chunks(height).take(width.div_ceil(DOUBLE_PANEL)).enumerate() {
                for (row, x) in rows.chunks_exact_mut(n).zip(x) {
                    let to = &mut row[first..first + width][at * DOUBLE_PANEL..];
                    to.iter_mut().zip(x).for_each(|(to, x)| *to = *x);
                }
            }
        });
        // And right of it: A -= X X^T.
        let count = below.len() / n;
        panels.resize(count.div_ceil(DOUBLE_PANEL) * width, [0.0; DOUBLE_PANEL]);
        panels.par_chunks_exact_mut(width).enumerate().for_each(|(at, panel)| {
            panel.fill([0.0; DOUBLE_PANEL]);
            for (j, row) in below.chunks_exact(n).skip(at * DOUBLE_PANEL).take(DOUBLE_PANEL).enumerate() {
                panel.iter_mut().zip(&row[first..]).for_each(|(to, x)| to[j] = *x);
            }
        });
        let panels = &panels[..];
        below.par_chunks_mut(BLOCK * n).enumerate().with_max_len(1).for_each(|(block, rows)| {
            let mut products = [[0.0; DOUBLE_PANEL]; BLOCK];
            let height = rows.len() / n;
            let columns = block * BLOCK + height;
            let products = &mut products[..height];
            for (at, panel) in panels.chunks_exact(width).take(columns.div_ceil(DOUBLE_PANEL)).enumerate() {
                multiply_double(&rows[first..], n, panel, products);
                let from = first + width + at * DOUBLE_PANEL;
                for (row, products) in rows.chunks_exact_mut(n).zip(&*products) {
                    row[from..].iter_mut().zip(products).for_each(|(a, p)| *a -= p);
                }
            }
        });
    }
    Ok(())
}

/// Cholesky of the first `size` rows and columns, row by row.
fn factor_corner(a: &mut [f64], size: usize, n: usize) -> std::result::Result<(), ()> {
    for i in 0..size {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
            let rest = a[i * n + j] - dot;
            if i > j {
                a[i * n + j] = rest / a[j * n + j];
            } else if rest > 0.0 && rest.is_finite() {
                a[i * n + i] = rest.sqrt();
            } else {
                return Err(());
            }
        }
    }
    Ok(())
}

/// The inverse of a lower triangle in its place, column by column.
fn invert_corner(a: &mut [f64], size: usize, n: usize) {
    for j in 0..size {
        a[j * n + j] = 1.0 / a[j * n + j];
    }
    // Row i of the inverse takes rows above it, which are inverted already, and what row i still is of L.
    for i in 1..size {
        let diagonal = a[i * n + i];
        for j in 0..i {
            // Columns j .. i of row i of L: those below j are overwritten and needed no more.
            let dot: f64 = (j..i).map(|k| a[i * n + k] * a[k * n + j]).sum();
            a[i * n + j] = -diagonal * dot;
        }
    }
}

/// `U^T`, where U is L^-1 with rows and columns in reverse. The blocks on the diagonal of `l` are inverses.
fn invert(l: &[f64], n: usize, turned: &mut [f32]) {
    let blocks: Vec<usize> = (0..n).step_by(BLOCK).collect();
    // Columns of L^-1 are rows of U^T from its end.
    let parts: Vec<&mut [f32]> = turned.rchunks_mut(BLOCK * n.max(1)).collect();
    parts.into_par_iter().zip(&blocks).with_max_len(1).for_each(|(rows, &first)| {
        let width = rows.len() / n;
        let size = n - first;
        let mut sums = [[0.0; DOUBLE_PANEL]; BLOCK];
        let mut x: Vec<Panel> = vec![[0.0; DOUBLE_PANEL]; size];
        for from in (0..width).step_by(DOUBLE_PANEL) {
            // Columns from .. of the block: X_JJ = L_JJ^-1, X_iJ = -L_ii^-1 sum of L_ik X_kJ.
            for i in blocks.iter().copied().filter(|&i| i >= first) {
                let height = BLOCK.min(n - i);
                let (done, rest) = x.split_at_mut(i - first);
                if i == first {
                    for (r, to) in rest[..height].iter_mut().enumerate() {
                        for (c, to) in to.iter_mut().enumerate() {
                            let column = from + c;
                            *to =
                                if column <= r && column < width { l[(i + r) * n + i + column] } else { 0.0 };
                        }
                    }
                    continue;
                }
                let sums = &mut sums[..height];
                multiply_double(&l[i * n + first..], n, done, sums);
                sums.iter_mut().flatten().for_each(|sum| *sum = -*sum);
                multiply_lower(&l[i * n + i..], n, sums, &mut rest[..height]);
            }
            for (r, x) in x.iter().enumerate() {
                for (c, value) in x.iter().enumerate().take(width - from) {
                    rows[(width - 1 - from - c) * n + n - 1 - first - r] = *value as f32;
                }
            }
        }
    });
}

/// Transposes in place, by tiles that stay in the cache.
fn transpose(square: &mut [f32], n: usize) {
    const TILE: usize = 32;
    for top in (0..n).step_by(TILE) {
        for left in (top..n).step_by(TILE) {
            for i in top..(top + TILE).min(n) {
                for j in left.max(i + 1)..(left + TILE).min(n) {
                    square.swap(i * n + j, j * n + i);
                }
            }
        }
    }
}

/// `out = T x` of a lower triangle, above whose diagonal other values may lie.
fn multiply_lower(triangle: &[f64], stride: usize, x: &[Panel], out: &mut [Panel]) {
    for (r, out) in out.iter_mut().enumerate() {
        multiply_double(&triangle[r * stride..], stride, &x[..r + 1], std::slice::from_mut(out));
    }
}

#[cfg(test)]
mod tests {
    use llmpress_model::Panels;

    use super::*;
    use crate::Extent;

    pub(crate) fn moments(features: usize, tokens: usize, value: impl Fn(usize, usize) -> f32) -> Moments {
        let mut x = Panels::zeros(features, tokens);
        (0..tokens).for_each(|t| x.set_token(t, (0..features).map(|f| value(f, t))));
        let mut moments = Moments::new(features, Extent::Full).unwrap();
        moments.add(&x).unwrap();
        moments.close()
    }

    fn noise(f: usize, t: usize) -> f32 {
        let x = (f as u64 * 0x9E37_79B9 + t as u64 * 0x85EB_CA6B + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        ((x >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * (1.0 + (f % 7) as f32)
    }

    #[test]
    fn the_factor_squared_is_the_inverse_of_the_damped_hessian() {
        for (n, tokens, in_order) in [
            (1, 3, Order::Falling),
            (5, 9, Order::LeftToRight),
            (127, 200, Order::Falling),
            (128, 40, Order::Falling),
            (129, 300, Order::LeftToRight),
            (300, 500, Order::Falling),
        ] {
            let m = moments(n, tokens, noise);
            let h = m.full().unwrap().to_vec();
            let factor = Factor::new(m, in_order).unwrap();
            assert_eq!(factor.damping(), DAMPING);
            let order = factor.order();
            let diagonal = |i: usize| f64::from(h[i * n + i]);
            assert!(order.windows(2).all(|p| match in_order {
                Order::Falling => diagonal(p[0] as usize) >= diagonal(p[1] as usize),
                Order::LeftToRight => p[0] < p[1],
            }));
            let damp = DAMPING * (0..n).map(diagonal).sum::<f64>() / n as f64;
            // R = U^-1 is upper too, and R R^T is the Hessian: U (H U^T) = 1.
            let u = |i: usize, j: usize| if j < i { 0.0 } else { f64::from(factor.row(i)[j - i]) };
            let hd = |i: usize, j: usize| {
                let (a, b) = (order[i] as usize, order[j] as usize);
                f64::from(h[a * n + b]) + if i == j { damp } else { 0.0 }
            };
            let right: Vec<f64> = (0..n * n)
                .map(|at| (at / n, at % n))
                .map(|(i, j)| (j..n).map(|k| hd(i, k) * u(j, k)).sum())
                .collect();
            for i in 0..n {
                for j in 0..n {
                    let product: f64 = (i..n).map(|k| u(i, k) * right[k * n + j]).sum();
                    let expected = f64::from(u8::from(i == j));
                    assert!((product - expected).abs() < 1e-3, "{n}: {i} {j} {product}");
                }
            }
        }
    }

    #[test]
    fn the_factor_is_the_same_bits_on_any_number_of_threads() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| Factor::new(moments(400, 90, noise), Order::Falling).unwrap())
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5));
    }

    #[test]
    fn columns_are_put_in_order_and_back_and_dead_ones_are_zero() {
        let n = 40;
        let factor =
            Factor::new(moments(n, 100, |f, t| if f == 7 { 0.0 } else { noise(f, t) }), Order::Falling)
                .unwrap();
        let weights: Vec<f32> = (0..3 * n).map(|i| i as f32 + 1.0).collect();
        let ordered = factor.ordered(&weights);
        let first = factor.order()[0] as usize;
        assert_eq!((ordered[0], ordered[n]), (weights[first], weights[n + first]));
        let back = factor.put_back(&ordered);
        assert!((0..3 * n).all(|i| back[i] == if i % n == 7 { 0.0 } else { weights[i] }));
    }

    #[test]
    fn dead_columns_come_last_and_disturb_nothing() {
        let dead = |f: usize| f % 5 == 2;
        let m = moments(40, 100, |f, t| if dead(f) { 0.0 } else { noise(f, t) });
        let factor = Factor::new(m, Order::Falling).unwrap();
        assert!((0..40).all(|f| factor.dead()[f] == dead(f)));
        for (i, &column) in factor.order().iter().enumerate() {
            if dead(column as usize) {
                assert!(factor.row(i)[1..].iter().all(|u| *u == 0.0));
            }
        }
    }

    #[test]
    fn a_hessian_that_is_not_positive_definite_is_damped_more_and_it_is_said() {
        // All columns equal: of rank one. Single precision makes some eigenvalues negative, which 1 % covers.
        let one = Factor::new(moments(50, 7, |_, t| t as f32 + 0.1), Order::Falling).unwrap();
        assert_eq!(one.damping(), DAMPING);
        // Not of moments: an eigenvalue far below zero.
        let mut a = vec![0.0; 4];
        let h = [1.0, 1.05, 1.05, 1.0f32];
        fill(&mut a, &h, &[1.0, 1.0], &[false; 2], &[0, 1], 0.01);
        assert!(cholesky(&mut a, 2).is_err());
        fill(&mut a, &h, &[1.0, 1.0], &[false; 2], &[0, 1], 0.1);
        assert!(cholesky(&mut a, 2).is_ok());
        let diagonal = Moments::new(3, Extent::Diagonal).unwrap().close();
        assert!(Factor::new(diagonal, Order::Falling).unwrap_err().to_string().contains("whole Hessian"));
    }
}
