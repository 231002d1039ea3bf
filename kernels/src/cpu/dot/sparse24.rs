//! The product of a single token with weights of which two of four are kept.
//!
//! ```text
//! positions --> a bit a column --> values spread over the columns --> as in `dot_rows`
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod codes;
mod fixed12;

pub use codes::dot_sparse_codes;
pub use fixed12::{SparseFault, dot_sparse_fixed12};

use super::{LANES, fold};
use crate::cpu::isa::Isa;
use crate::cpu::sparse24::{BadPositions, Sparse24};

/// [`super::dot_rows`] of the dense matrix, to the bit: what is not kept multiplies as +0. No weight is written to memory.
///
/// On an error the content of `out` is unspecified.
///
/// # Errors
/// [`BadPositions`].
///
/// # Panics
/// Where `x` does not have as many values as the matrix has columns, or `out` as many as it has rows.
pub fn dot_sparse24(weights: &Sparse24<'_>, x: &[f32], out: &mut [f32]) -> Result<(), BadPositions> {
    dot_sparse24_with(Isa::detect(), weights, x, out)
}

fn dot_sparse24_with(
    isa: Isa,
    weights: &Sparse24<'_>,
    x: &[f32],
    out: &mut [f32],
) -> Result<(), BadPositions> {
    assert!(x.len() == weights.cols() && out.len() == weights.rows());
    #[allow(unsafe_code)]
    let good = match isa {
        // SAFETY: the features were detected, and the lengths checked above and when `weights` was made.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot(weights, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot(weights, x, out) },
        Isa::Portable => reference(weights, x, out),
    };
    if good { Ok(()) } else { Err(BadPositions) }
}

fn reference(weights: &Sparse24<'_>, x: &[f32], out: &mut [f32]) -> bool {
    let values = weights.values();
    for (row, out) in out.iter_mut().enumerate() {
        let (mut sums, mut next) = ([0.0_f32; LANES], row * x.len() / 2);
        for ((i, x), (kept, right)) in x.chunks(8).enumerate().zip(weights.kept(row)) {
            if !right {
                return false;
            }
            for (j, x) in x.iter().enumerate() {
                let mut weight = 0.0;
                if kept >> j & 1 == 1 {
                    weight = values.get(next);
                    next += 1;
                }
                let sum = &mut sums[(8 * i + j) % LANES];
                *sum = weight.mul_add(*x, *sum);
            }
        }
        *out = fold(sums);
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::Elements;
    use crate::cpu::dot::dot_rows;
    use crate::cpu::sparse24::tests::positions;
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #[test]
        fn the_product_is_that_of_the_dense_weights(rows in 0usize..10, quads in 0usize..160, seed: u64) {
            let cols = 4 * quads;
            let single = values(seed, rows * cols / 2);
            let bf16: Vec<u16> = single.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let f16: Vec<u16> = single.iter().map(|w| half::f16::from_f32(*w).to_bits()).collect();
            let (x, positions) = (values(seed ^ 1, cols), positions(seed ^ 2, rows, cols));
            for values in [Elements::F32(&single), Elements::Bf16(&bf16), Elements::F16(&f16)] {
                let sparse = Sparse24::new(values, &positions, rows, cols).unwrap();
                let mut dense = vec![f32::NAN; rows * cols];
                sparse.widen(&mut dense).unwrap();
                let mut expected = vec![f32::NAN; rows];
                dot_rows(Elements::F32(&dense), cols, &x, &mut expected);
                for isa in Isa::available() {
                    let mut out = vec![f32::NAN; rows];
                    prop_assert_eq!(dot_sparse24_with(isa, &sparse, &x, &mut out), Ok(()));
                    prop_assert!(same_bits(&out, &expected), "{:?} {:?} {:?}", isa, out, expected);
                }
            }
        }

        #[test]
        fn positions_without_an_order_are_found(rows in 1usize..9, quads in 1usize..160, at: usize, bad in 0u8..16, seed: u64) {
            let cols = 4 * quads;
            let single = values(seed, rows * cols / 2);
            let bf16: Vec<u16> = single.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let (x, mut positions) = (values(seed ^ 1, cols), positions(seed ^ 2, rows, cols));
            let at = at % positions.len();
            positions[at] = positions[at] & 0xf0 | bad;
            for values in [Elements::F32(&single), Elements::Bf16(&bf16)] {
                let sparse = Sparse24::new(values, &positions, rows, cols).unwrap();
                let right = reference(&sparse, &x, &mut vec![0.0; rows]);
                prop_assert_eq!(right, crate::cpu::sparse24::KEPT[usize::from(bad)] != 0);
                for isa in Isa::available() {
                    let found = dot_sparse24_with(isa, &sparse, &x, &mut vec![0.0; rows]);
                    prop_assert_eq!(found.is_ok(), right, "{:?}", isa);
                }
            }
        }
    }
}
