//! Rows times vector: the product of a single token.
//!
//! ```text
//! sum i:  elements i, i + 64, i + 128, ...      64 sums side by side in vector lanes
//! 64 -> 32 -> 16 -> ... -> 1                     added as a tree
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "x86_64")]
mod by_parity;
mod fixed12;
mod sparse24;

pub use fixed12::dot_fixed12;
pub use sparse24::{SparseFault, dot_sparse_codes, dot_sparse_fixed12, dot_sparse24};

use super::Elements;
use super::isa::Isa;
use super::widen::widen;

/// Partial sums of a dot product: element `k` goes to sum `k % LANES`.
pub const LANES: usize = 64;

/// Bytes from what is read to what is asked of memory meanwhile: whole groups of rows, which start too often
/// for the processor to notice that they are streams.
#[cfg(target_arch = "x86_64")]
fn ahead(group: usize, element_bytes: usize) -> usize {
    const ENOUGH: usize = 16 << 10;
    let group = group.saturating_mul(element_bytes).max(1);
    group.saturating_mul(ENOUGH.div_ceil(group))
}

/// `out[r] = sum over k of weights[r * stride + k] * x[k]`.
///
/// [`LANES`] partial sums start from +0; element `k` is added to sum `k % LANES` by a fused multiply-add, in
/// ascending `k`. Then sum `i` takes sum `i + 32` for `i < 32`, sum `i + 16` for `i < 16`, and so on
/// down to one.
///
/// # Panics
/// Where `stride` is less than `x.len()` or `weights` is too short.
pub fn dot_rows(weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    dot_rows_with(Isa::detect(), weights, stride, x, out);
}

fn dot_rows_with(isa: Isa, weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    let last =
        out.len().checked_sub(1).map(|last| last.checked_mul(stride).and_then(|n| n.checked_add(x.len())));
    assert!(stride >= x.len() && last.is_none_or(|end| end.is_some_and(|end| end <= weights.len())));
    #[allow(unsafe_code)]
    match isa {
        // SAFETY: the features were detected, and the lengths checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot_rows(weights, stride, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot_rows(weights, stride, x, out) },
        Isa::Portable => reference(weights, stride, x, out),
    }
}

fn reference(weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    let mut row = [0.0_f32; LANES];
    for (r, out) in out.iter_mut().enumerate() {
        let mut sums = [0.0_f32; LANES];
        for (i, x) in x.chunks(LANES).enumerate() {
            let row = &mut row[..x.len()];
            widen(Isa::Portable, weights, r * stride + i * LANES, row);
            for ((sum, w), x) in sums.iter_mut().zip(row).zip(x) {
                *sum = w.mul_add(*x, *sum);
            }
        }
        *out = fold(sums);
    }
}

/// The tree that ends a dot product.
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #[test]
        fn every_path_adds_in_the_same_order(rows in 0usize..10, cols in 0usize..200, gap in 0usize..5, seed: u64) {
            let stride = cols + gap;
            let single = values(seed, rows * stride);
            let bf16: Vec<u16> = single.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let f16: Vec<u16> = single.iter().map(|w| half::f16::from_f32(*w).to_bits()).collect();
            let x = values(seed ^ 1, cols);
            for weights in [Elements::F32(&single), Elements::Bf16(&bf16), Elements::F16(&f16)] {
                let mut expected = vec![f32::NAN; rows];
                reference(weights, stride, &x, &mut expected);
                for isa in Isa::available() {
                    let mut out = vec![f32::NAN; rows];
                    dot_rows_with(isa, weights, stride, &x, &mut out);
                    prop_assert!(same_bits(&out, &expected), "{isa:?} {out:?} {expected:?}");
                }
            }
        }
    }
}
