//! Paley's two families of Hadamard matrices (Paley, "On orthogonal matrices", 1933), over prime fields.
//!
//! ```text
//! first    q = 3 mod 4    order q + 1        I + S, S skew
//! second   q = 1 mod 4    order 2 (q + 1)    C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], C symmetric
//! ```

/// The largest order: a product with it takes so many additions a value.
pub(super) const MAX_ORDER: u32 = 1024;

/// A Hadamard matrix that is no power of two.
#[derive(Clone, Debug)]
pub(super) struct Paley {
    order: usize,
    /// 1 and -1, row-major.
    signs: Vec<f32>,
    transposed: Vec<f32>,
}

impl Paley {
    /// The one of an order, if there is one.
    pub(super) fn of(order: u32) -> Option<Self> {
        if order.is_power_of_two() {
            return None;
        }
        let q = prime(order)?;
        let n = order as usize;
        let squares = squares(q);
        let character = |from: usize, to: usize| squares[(to + q - from) % q];
        let first = q + 1 == n;
        let entry = |i: usize, j: usize| -> i8 {
            if first {
                match (i, j) {
                    (0, _) => 1,
                    (_, 0) => -1,
                    (i, j) if i == j => 1,
                    (i, j) => character(i - 1, j - 1),
                }
            } else {
                let (row, column) = (i / 2, j / 2);
                let corner = (i % 2, j % 2);
                match (row, column) {
                    (row, column) if row == column => {
                        if corner == (0, 0) {
                            1
                        } else {
                            -1
                        }
                    }
                    (row, column) => {
                        let c = if row == 0 || column == 0 { 1 } else { character(row - 1, column - 1) };
                        if corner == (1, 1) { -c } else { c }
                    }
                }
            }
        };
        let all = |transposed: bool| -> Vec<f32> {
            let pairs = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
            pairs.map(|(i, j)| f32::from(if transposed { entry(j, i) } else { entry(i, j) })).collect()
        };
        Some(Self { order: n, signs: all(false), transposed: all(true) })
    }

    pub(super) fn order(&self) -> usize {
        self.order
    }

    pub(super) fn signs(&self) -> &[f32] {
        &self.signs
    }

    pub(super) fn transposed(&self) -> &[f32] {
        &self.transposed
    }
}

/// The prime behind an order: the first family's, else the second's.
pub(super) fn prime(order: u32) -> Option<usize> {
    if !(4..=MAX_ORDER).contains(&order) || !order.is_multiple_of(4) {
        return None;
    }
    let (first, second) = (order - 1, order / 2 - 1);
    if is_prime(first) {
        // An order is a multiple of 4, so this is 3 modulo 4.
        Some(first as usize)
    } else if second % 4 == 1 && is_prime(second) {
        Some(second as usize)
    } else {
        None
    }
}

fn is_prime(n: u32) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// The quadratic character of every residue.
fn squares(q: usize) -> Vec<i8> {
    let mut character = vec![-1i8; q];
    (1..q).for_each(|a| character[a * a % q] = 1);
    character[0] = 0;
    character
}
