//! Weights of which each four consecutive ones of a row keep two, from values and positions.
//!
//! ```text
//! positions, a byte:  low nibble = the even quad, high nibble = the odd one; in a nibble the lower position first
//! values:             two for each quad, in the order of columns
//! ```

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod codes;

use super::Elements;
use super::isa::Isa;

/// Columns of which two are kept.
pub const QUAD: usize = 4;

/// Columns of a byte of positions.
const BYTE_COLUMNS: usize = 2 * QUAD;

/// Of a nibble of positions, which of its four columns are kept; 0 where the first does not lie before the second.
pub(super) const KEPT: [u8; 16] = {
    let mut kept = [0; 16];
    let mut nibble = 0;
    while nibble < 16 {
        let (first, second) = (nibble & 3, nibble >> 2);
        if first < second {
            kept[nibble] = 1 << first | 1 << second;
        }
        nibble += 1;
    }
    kept
};

/// A nibble's positions have no order in some row, or bits are set past the last quad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPositions;

/// Rows of a matrix as they are stored.
#[derive(Clone, Copy, Debug)]
pub struct Sparse24<'a> {
    /// `[rows, cols / 2]`.
    values: Elements<'a>,
    /// `[rows, ceil(cols / 8)]`.
    positions: &'a [u8],
    rows: usize,
    cols: usize,
}

impl<'a> Sparse24<'a> {
    /// `None` where `cols` is no multiple of [`QUAD`], or the sizes do not fit.
    #[must_use]
    pub fn new(values: Elements<'a>, positions: &'a [u8], rows: usize, cols: usize) -> Option<Self> {
        let fits = cols.is_multiple_of(QUAD)
            && rows.checked_mul(cols / 2) == Some(values.len())
            && rows.checked_mul(cols.div_ceil(BYTE_COLUMNS)) == Some(positions.len());
        fits.then_some(Self { values, positions, rows, cols })
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Of the dense matrix.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where a row's values start.
    pub(super) fn values(&self) -> Elements<'a> {
        self.values
    }

    /// A row's positions.
    pub(super) fn positions(&self, row: usize) -> &'a [u8] {
        let bytes = self.cols.div_ceil(BYTE_COLUMNS);
        &self.positions[row * bytes..][..bytes]
    }

    /// Of each eight columns of a row, which are kept, and whether all quads say it rightly.
    pub(super) fn kept(&self, row: usize) -> impl Iterator<Item = (u8, bool)> + 'a {
        let (positions, odd) = (self.positions(row), !self.cols.is_multiple_of(BYTE_COLUMNS));
        let last = positions.len().wrapping_sub(1);
        positions.iter().enumerate().map(move |(i, &byte)| {
            let (low, high) = (KEPT[usize::from(byte & 15)], KEPT[usize::from(byte >> 4)]);
            let single = odd && i == last;
            (low | high << QUAD, low != 0 && if single { byte >> 4 == 0 } else { high != 0 })
        })
    }

    /// Writes all rows, in single precision, into `out` of `rows * cols`: what is not kept becomes +0.
    ///
    /// # Errors
    /// [`BadPositions`]; `out` is unspecified then.
    ///
    /// # Panics
    /// Where `out` has another length.
    pub fn widen(&self, out: &mut [f32]) -> Result<(), BadPositions> {
        self.widen_with(Isa::detect(), out)
    }

    fn widen_with(&self, isa: Isa, out: &mut [f32]) -> Result<(), BadPositions> {
        assert_eq!(out.len(), self.rows * self.cols);
        let good = match isa {
            #[allow(unsafe_code)]
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the features were detected, and the lengths checked above and by `new`.
            Isa::Avx512 => unsafe { avx512::widen(self, out) },
            _ => self.widen_plainly(out),
        };
        if good { Ok(()) } else { Err(BadPositions) }
    }

    fn widen_plainly(&self, out: &mut [f32]) -> bool {
        let mut good = true;
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            let mut next = row * self.cols / 2;
            for ((kept, right), out) in self.kept(row).zip(out.chunks_mut(BYTE_COLUMNS)) {
                good &= right;
                for (i, out) in out.iter_mut().enumerate() {
                    *out = 0.0;
                    if kept >> i & 1 == 1 {
                        *out = self.values.get(next);
                        next += 1;
                    }
                }
            }
            if !good {
                return false;
            }
        }
        good
    }
}

#[cfg(test)]
pub(super) mod tests {
    use llmpress_numbers::Numbers;
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    /// Positions of so many rows, by chance.
    pub(in crate::cpu) fn positions(seed: u64, rows: usize, cols: usize) -> Vec<u8> {
        let mut numbers = Numbers::new(seed);
        let mut nibble = || loop {
            let nibble = (numbers.bits() >> 40) as u8 & 15;
            if KEPT[usize::from(nibble)] != 0 {
                return nibble;
            }
        };
        let mut row = |_| {
            let quads: Vec<u8> = (0..cols / QUAD).map(|_| nibble()).collect();
            quads.chunks(2).map(|two| two[0] | two.get(1).unwrap_or(&0) << 4).collect::<Vec<u8>>()
        };
        (0..rows).flat_map(&mut row).collect()
    }

    #[test]
    fn a_nibble_keeps_two_of_four() {
        assert_eq!(KEPT.iter().filter(|kept| kept.count_ones() == 2).count(), 6);
        assert_eq!(KEPT.iter().filter(|kept| **kept == 0).count(), 10);
        assert_eq!(KEPT[0b1101], 0b1010);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let values = [0u16; 8];
        let of = |values, positions: usize, rows, cols| {
            Sparse24::new(Elements::Bf16(values), &[4; 8][..positions], rows, cols).is_some()
        };
        assert!(of(&values, 2, 2, 8) && of(&values[..2], 1, 1, 4) && of(&values[..0], 0, 3, 0));
        assert!(!of(&values[..3], 1, 1, 6) && !of(&values, 2, 1, 8) && !of(&values, 3, 2, 8));
        assert!(!of(&values, 2, usize::MAX, 8));
    }

    proptest! {
        #[test]
        fn every_path_widens_alike(rows in 0usize..5, quads in 0usize..160, seed: u64) {
            let cols = quads * QUAD;
            let single = values(seed, rows * cols / 2);
            let bf16: Vec<u16> = single.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let f16: Vec<u16> = single.iter().map(|w| half::f16::from_f32(*w).to_bits()).collect();
            let positions = positions(seed ^ 2, rows, cols);
            for values in [Elements::F32(&single), Elements::Bf16(&bf16), Elements::F16(&f16)] {
                let sparse = Sparse24::new(values, &positions, rows, cols).unwrap();
                let mut expected = vec![f32::NAN; rows * cols];
                prop_assert!(sparse.widen_plainly(&mut expected));
                prop_assert_eq!(expected.chunks_exact(QUAD).filter(|quad| quad.iter().filter(|w| w.to_bits() != 0).count() > 2).count(), 0);
                for isa in Isa::available() {
                    let mut out = vec![f32::NAN; rows * cols];
                    prop_assert_eq!(sparse.widen_with(isa, &mut out), Ok(()));
                    prop_assert!(same_bits(&out, &expected), "{:?}", isa);
                }
            }
        }

        #[test]
        fn positions_without_an_order_are_found(rows in 1usize..4, quads in 1usize..140, at: usize, bad in 0u8..16, seed: u64) {
            prop_assume!(KEPT[usize::from(bad)] == 0);
            let cols = quads * QUAD;
            let single = values(seed, rows * cols / 2);
            let mut positions = positions(seed ^ 2, rows, cols);
            let quad = at % (rows * quads);
            let byte = &mut positions[quad / quads * quads.div_ceil(2) + quad % quads / 2];
            *byte = if quad % quads % 2 == 0 { *byte & 0xf0 | bad } else { *byte & 15 | bad << 4 };
            let sparse = Sparse24::new(Elements::F32(&single), &positions, rows, cols).unwrap();
            for isa in Isa::available() {
                prop_assert_eq!(sparse.widen_with(isa, &mut vec![0.0; rows * cols]), Err(BadPositions));
            }
        }

        #[test]
        fn bits_past_the_last_quad_are_found(rows in 1usize..4, pairs in 0usize..70, row: usize, bad in 1u8..16, seed: u64) {
            let cols = pairs * BYTE_COLUMNS + QUAD;
            let single = values(seed, rows * cols / 2);
            let mut positions = positions(seed ^ 2, rows, cols);
            positions[(row % rows + 1) * (pairs + 1) - 1] |= bad << 4;
            let sparse = Sparse24::new(Elements::F32(&single), &positions, rows, cols).unwrap();
            for isa in Isa::available() {
                prop_assert_eq!(sparse.widen_with(isa, &mut vec![0.0; rows * cols]), Err(BadPositions));
            }
        }
    }
}
