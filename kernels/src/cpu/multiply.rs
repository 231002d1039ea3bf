//! Matrix times panel: the product of a prefill.
//!
//! ```text
//! 8 weights, each over a vector's lanes  x  3 vectors of 16 tokens  -->  24 vectors of sums in registers
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::isa::Isa;

/// `out[r * width + t] = sum over k of weights[r * stride + k] * x[k * width + t]`, the rows of `out` being
/// `out.len() / width` and `k` running over `x.len() / width`.
///
/// Each sum starts from +0 and takes its terms in ascending `k`, every one by a fused multiply-add: the
/// bits do not depend on the processor, nor on how tokens or rows are split into calls.
///
/// # Panics
/// Where `width` is 0, `x` or `out` are no whole rows of `width`, `stride` is less than the columns, or
/// `weights` is too short.
pub fn multiply(weights: &[f32], stride: usize, x: &[f32], width: usize, out: &mut [f32]) {
    multiply_with(Isa::detect(), weights, stride, x, width, out);
}

fn multiply_with(isa: Isa, weights: &[f32], stride: usize, x: &[f32], width: usize, out: &mut [f32]) {
    let (rows, cols) = (out.len() / width, x.len() / width);
    assert!(x.len().is_multiple_of(width) && out.len().is_multiple_of(width) && stride >= cols);
    let needed =
        rows.checked_sub(1).and_then(|last| last.checked_mul(stride)).and_then(|n| n.checked_add(cols));
    assert!(rows == 0 || needed.is_some_and(|needed| needed <= weights.len()));
    #[allow(unsafe_code)]
    match isa {
        // SAFETY: the features were detected, and the lengths checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::multiply(weights, stride, x, width, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::multiply(weights, stride, x, width, out) },
        Isa::Portable => reference(weights, stride, x, width, out),
    }
}

fn reference(weights: &[f32], stride: usize, x: &[f32], width: usize, out: &mut [f32]) {
    let cols = x.len() / width;
    for (r, out) in out.chunks_exact_mut(width).enumerate() {
        out.fill(0.0);
        for (&w, x) in weights[r * stride..][..cols].iter().zip(x.chunks_exact(width)) {
            for (sum, &x) in out.iter_mut().zip(x) {
                *sum = w.mul_add(x, *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    proptest! {
        #[test]
        fn every_path_adds_in_the_same_order(
            rows in 0usize..40, cols in prop_oneof![0usize..70, 70usize..700], gap in 0usize..5,
            width in 1usize..=60, seed: u64,
        ) {
            let stride = cols + gap;
            let weights = values(seed, rows * stride);
            let x = values(seed ^ 1, cols * width);
            let mut expected = vec![f32::NAN; rows * width];
            reference(&weights, stride, &x, width, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows * width];
                multiply_with(isa, &weights, stride, &x, width, &mut out);
                prop_assert!(same_bits(&out, &expected), "{isa:?}");
            }
        }
    }
}
