//! The product of a single token with codes of weights of which two of four are kept.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use crate::cpu::dot::{LANES, fold};
use crate::cpu::isa::Isa;
use crate::cpu::sparse24::codes::{BLOCK_COLS, Grids, SparseCodes};

const _: () = assert!(LANES == BLOCK_COLS);

/// [`super::super::dot_rows`] of some rows of the dense matrix of what the codes stand for ([`SparseCodes::widen`]), to the
/// bit. No weight is written to memory.
///
/// # Panics
/// Where there are no such rows, `x` does not have as many values as the matrix has columns, or `out` as many as rows are
/// asked for.
pub fn dot_sparse_codes(codes: &SparseCodes, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
    dot_sparse_codes_with(Isa::detect(), codes, rows, x, out);
}

fn dot_sparse_codes_with(isa: Isa, codes: &SparseCodes, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
    assert!(rows.start <= rows.end && rows.end <= codes.rows());
    assert!(x.len() == codes.cols() && out.len() == rows.len());
    #[allow(unsafe_code)]
    match isa {
        // SAFETY: the features were detected, and the lengths checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot(codes, rows.start, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot(codes, rows.start, x, out) },
        Isa::Portable => reference(codes, rows.start, x, out),
    }
}

fn reference(codes: &SparseCodes, first: usize, x: &[f32], out: &mut [f32]) {
    let mut grids = Grids::default();
    for (i, out) in out.iter_mut().enumerate() {
        let row = first + i;
        codes.grids(row..row + 1, &mut grids);
        let mut sums = [0.0_f32; LANES];
        codes.blocks_of_row(row, &grids, |block, weights| {
            for ((sum, weight), x) in sums.iter_mut().zip(weights).zip(&x[block * BLOCK_COLS..]) {
                *sum = weight.mul_add(*x, *sum);
            }
        });
        *out = fold(sums);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::Elements;
    use crate::cpu::dot::dot_rows;
    use crate::cpu::sparse24::codes::tests::{Case, kinds};
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        #[test]
        fn the_product_with_codes_is_that_of_the_dense_weights(
            kind in kinds(), rows in 0usize..11, quads in 0usize..90, some: [prop::sample::Index; 2], seed: u64,
        ) {
            let case = Case::new(kind, rows, quads, seed);
            let (a, b) = (some[0].index(rows + 1), some[1].index(rows + 1));
            let rows = a.min(b)..a.max(b);
            let cols = 4 * quads;
            let x = values(seed ^ 1, cols);
            let mut expected = vec![f32::NAN; rows.len()];
            let dense = &case.dense[rows.start * cols..rows.end * cols];
            dot_rows(Elements::F32(dense), cols, &x, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows.len()];
                dot_sparse_codes_with(isa, &case.codes, rows.clone(), &x, &mut out);
                prop_assert!(same_bits(&out, &expected), "{:?} {:?} {:?}", isa, out, expected);
            }
        }
    }
}
