//! Orthogonal Hadamard transforms of the features of activations, and of rows or columns of weights.
//!
//! ```text
//! y = R x    R = diag(B, B, ...) D    B = (H1 x H2 x ... ) / sqrt(b)    x: Kronecker    D: signs
//!
//! last factor first:   2^k    butterflies (a, b) -> (a + b, a - b) at distance 1, 2, 4, ...
//!                      Paley  y_i = +-x_0 +- x_1 +- ... in ascending order
//! then every value is multiplied by 1 / sqrt(b)
//! ```
//!
//! R is orthogonal, so its inverse is its transpose: the same with Paley's matrices transposed and the signs last.
//! Section 2.2 of the format says which matrices these are.

mod paley;
mod plan;

use super::isa::{Isa, multiversion};
use paley::Paley;

/// Values of a Paley factor's outputs that are summed side by side.
const TILE: usize = 16;

/// An orthogonal transform of vectors of one size.
#[derive(Clone, Debug)]
pub struct Hadamard {
    size: usize,
    /// Size of a block of the diagonal.
    block: usize,
    factors: Vec<Factor>,
    scale: f32,
    /// Features whose sign D flips; empty where there is no D.
    flipped: Vec<bool>,
    orders: Vec<u32>,
    seed: Option<u32>,
}

#[derive(Clone, Debug)]
enum Factor {
    /// Sylvester's matrix of order 2^k.
    Sylvester(usize),
    Paley(Paley),
}

impl Factor {
    fn of(order: u32) -> Result<Self, String> {
        if order >= 2 && order.is_power_of_two() {
            return Ok(Self::Sylvester(order as usize));
        }
        match Paley::of(order) {
            Some(paley) => Ok(Self::Paley(paley)),
            None => Err(format!(
                "there is no Hadamard matrix of order {order} here: a power of two, q + 1 with a prime q that is 3 modulo 4 or \
                 2 (q + 1) with one that is 1 modulo 4 is wanted, up to {}",
                paley::MAX_ORDER
            )),
        }
    }

    fn order(&self) -> usize {
        match self {
            Self::Sylvester(order) => *order,
            Self::Paley(paley) => paley.order(),
        }
    }
}

/// Which way a transform goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Forward,
    Back,
}

impl Hadamard {
    /// The one that takes the fewest additions of those whose blocks are as large as can be: the whole size where it is a
    /// product of known orders, else the largest power of two in it. Signs are drawn from `seed`.
    ///
    /// # Errors
    /// A size of 0 or above 2^24.
    pub fn new(size: usize, seed: Option<u32>) -> Result<Self, String> {
        let orders = plan::factors(size);
        Self::with_factors(size, &orders, seed)
    }

    /// With these Hadamard matrices in each block, the slowest index first.
    ///
    /// # Errors
    /// An order of which there is no matrix here; a product that does not divide `size`; a size of 0 or above 2^24.
    pub fn with_factors(size: usize, orders: &[u32], seed: Option<u32>) -> Result<Self, String> {
        if size == 0 || size > plan::MAX_SIZE {
            return Err(format!("a rotation has size {size}; it must be 1 to {}", plan::MAX_SIZE));
        }
        let block = orders.iter().try_fold(1usize, |n, f| n.checked_mul(*f as usize));
        let block = block.filter(|b| *b > 0 && size.is_multiple_of(*b)).ok_or_else(|| {
            format!("the product of the orders {orders:?} does not divide a rotation's size {size}")
        })?;
        let factors = orders.iter().map(|order| Factor::of(*order)).collect::<Result<_, _>>()?;
        let scale = (1.0 / (block as f64).sqrt()) as f32;
        let flipped = seed.map(|seed| plan::flipped(size, seed)).unwrap_or_default();
        Ok(Self { size, block, factors, scale, flipped, orders: orders.to_vec(), seed })
    }

    /// Features of a vector.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The orders of the Hadamard matrices of a block, the slowest index first.
    #[must_use]
    pub fn factors(&self) -> &[u32] {
        &self.orders
    }

    /// What the signs were drawn from.
    #[must_use]
    pub fn seed(&self) -> Option<u32> {
        self.seed
    }

    /// `x = R x` for each of `width` columns of a matrix of [`Self::size`] rows, `x[feature * width + column]`: a panel of
    /// activations, or the columns of weights. With a width of 1, one vector.
    ///
    /// Signs are flipped; then, the last factor first, values are added as the module says; then each is multiplied by the
    /// rounded `1 / sqrt(block)`. The same bits on every processor.
    ///
    /// # Panics
    /// Where `x` is not `size` x `width`.
    pub fn forward(&self, x: &mut [f32], width: usize) {
        self.run(Isa::detect(), x, width, Way::Forward);
    }

    /// `x = R^T x`, the inverse of [`Self::forward`], for each of `width` columns.
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn back(&self, x: &mut [f32], width: usize) {
        self.run(Isa::detect(), x, width, Way::Back);
    }

    fn run(&self, isa: Isa, x: &mut [f32], width: usize, way: Way) {
        assert!(x.len() == self.size * width);
        if x.is_empty() {
            return;
        }
        if way == Way::Forward {
            self.flip(x, width);
        }
        for block in x.chunks_exact_mut(self.block * width) {
            let mut stride = width;
            for factor in self.factors.iter().rev() {
                match factor {
                    Factor::Sylvester(order) => sylvester(isa, block, stride, *order),
                    Factor::Paley(paley) => paley_factor(isa, block, stride, paley, way),
                }
                stride *= factor.order();
            }
        }
        x.iter_mut().for_each(|x| *x *= self.scale);
        if way == Way::Back {
            self.flip(x, width);
        }
    }

    fn flip(&self, x: &mut [f32], width: usize) {
        for (row, flipped) in x.chunks_exact_mut(width).zip(&self.flipped) {
            if *flipped {
                row.iter_mut().for_each(|x| *x = -*x);
            }
        }
    }
}

/// The butterflies of a factor whose index moves by `stride`.
fn sylvester(isa: Isa, x: &mut [f32], stride: usize, order: usize) {
    #[inline(always)]
    fn body(x: &mut [f32], stride: usize, order: usize) {
        let mut distance = 1;
        if stride == 1 && order >= 16 {
            // The first four distances of a vector stay in registers.
            for x in x.chunks_exact_mut(16) {
                for distance in [1, 2, 4, 8] {
                    for i in (0..16).filter(|i| i & distance == 0) {
                        let (a, b) = (x[i], x[i + distance]);
                        (x[i], x[i + distance]) = (a + b, a - b);
                    }
                }
            }
            distance = 16;
        }
        while distance < order {
            let half = distance * stride;
            for pair in x.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            distance *= 2;
        }
    }
    multiversion!(isa, body(x: &mut [f32], stride: usize, order: usize));
}

/// A Paley factor whose index moves by `stride`.
fn paley_factor(isa: Isa, x: &mut [f32], stride: usize, paley: &Paley, way: Way) {
    #[inline(always)]
    fn body(x: &mut [f32], stride: usize, order: usize, signs: &[f32], scratch: &mut [f32]) {
        for x in x.chunks_exact_mut(order * stride) {
            for first in (0..stride).step_by(TILE) {
                let width = TILE.min(stride - first);
                // What lies past the width is summed too, and not kept.
                for (row, to) in scratch.chunks_exact_mut(TILE).enumerate() {
                    let from = row * stride + first;
                    to[..width].copy_from_slice(&x[from..from + width]);
                }
                for (row, signs) in signs.chunks_exact(order).enumerate() {
                    let mut sums = [0.0f32; TILE];
                    for (j, (values, sign)) in scratch.chunks_exact(TILE).zip(signs).enumerate() {
                        for (sum, value) in sums.iter_mut().zip(values) {
                            // A product with 1 or -1 is exact.
                            *sum = if j == 0 { sign * value } else { *sum + sign * value };
                        }
                    }
                    let to = row * stride + first;
                    x[to..to + width].copy_from_slice(&sums[..width]);
                }
            }
        }
    }
    /// One vector: as many outputs side by side.
    #[inline(always)]
    fn vector(x: &mut [f32], order: usize, columns: &[f32], scratch: &mut [f32]) {
        for x in x.chunks_exact_mut(order) {
            for (j, (value, signs)) in x.iter().zip(columns.chunks_exact(order)).enumerate() {
                for (sum, sign) in scratch.iter_mut().zip(signs) {
                    *sum = if j == 0 { sign * value } else { *sum + sign * value };
                }
            }
            x.copy_from_slice(&scratch[..order]);
        }
    }
    let order = paley.order();
    let (rows, columns) = match way {
        Way::Forward => (paley.signs(), paley.transposed()),
        Way::Back => (paley.transposed(), paley.signs()),
    };
    if stride == 1 {
        let scratch = &mut vec![0.0; order][..];
        multiversion!(isa, vector(x: &mut [f32], order: usize, columns: &[f32], scratch: &mut [f32]));
    } else {
        let scratch = &mut vec![0.0; order * TILE][..];
        multiversion!(isa, body(x: &mut [f32], stride: usize, order: usize, rows: &[f32], scratch: &mut [f32]));
    }
}

#[cfg(test)]
mod tests;
