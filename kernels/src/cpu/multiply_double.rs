//! Matrix times panel in double precision: what factoring a Hessian takes.
//!
//! ```text
//! 8 rows of `a`, each over a panel's 24 columns  -->  24 vectors of sums in registers
//! ```
//!
//! One source for all processors: a compiler makes vector instructions of it where it may use them, and a fused
//! multiply-add gives the same bits everywhere.

use super::isa::Isa;

/// Columns of a panel of doubles; short ones are filled up with zeros.
pub const DOUBLE_PANEL: usize = 24;

/// `out[r][c] = sum over k of a[r * stride + k] * x[k][c]`, k running over `x`.
///
/// Each sum starts from +0 and takes its terms in ascending `k`, every one by a fused multiply-add: the bits do not
/// depend on the processor, nor on how rows are split into calls.
///
/// # Panics
/// Where `stride` is less than the length of `x`, or `a` is too short.
pub fn multiply_double(a: &[f64], stride: usize, x: &[[f64; DOUBLE_PANEL]], out: &mut [[f64; DOUBLE_PANEL]]) {
    multiply_with(Isa::detect(), a, stride, x, out);
}

fn multiply_with(
    isa: Isa,
    a: &[f64],
    stride: usize,
    x: &[[f64; DOUBLE_PANEL]],
    out: &mut [[f64; DOUBLE_PANEL]],
) {
    let needed = out.len().checked_sub(1).and_then(|last| last.checked_mul(stride));
    let needed = needed.and_then(|n| n.checked_add(x.len()));
    assert!(stride >= x.len() && (out.is_empty() || needed.is_some_and(|needed| needed <= a.len())));
    #[allow(unsafe_code)]
    match isa {
        // SAFETY: the features were detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(a, stride, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(a, stride, x, out) },
        Isa::Portable => reference(a, stride, x, out),
    }
}

fn reference(a: &[f64], stride: usize, x: &[[f64; DOUBLE_PANEL]], out: &mut [[f64; DOUBLE_PANEL]]) {
    for (r, out) in out.iter_mut().enumerate() {
        *out = [0.0; DOUBLE_PANEL];
        for (&w, x) in a[r * stride..][..x.len()].iter().zip(x) {
            for (sum, &x) in out.iter_mut().zip(x) {
                *sum = w.mul_add(x, *sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(a: &[f64], stride: usize, x: &[[f64; DOUBLE_PANEL]], out: &mut [[f64; DOUBLE_PANEL]]) {
    let mut eight = out.chunks_exact_mut(8);
    let mut row = 0;
    for out in &mut eight {
        tile::<8, DOUBLE_PANEL>(&a[row * stride..], stride, x, out, 0);
        row += 8;
    }
    for out in eight.into_remainder().chunks_exact_mut(1) {
        tile::<1, DOUBLE_PANEL>(&a[row * stride..], stride, x, out, 0);
        row += 1;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(a: &[f64], stride: usize, x: &[[f64; DOUBLE_PANEL]], out: &mut [[f64; DOUBLE_PANEL]]) {
    // Two vectors of columns: registers hold six rows of them.
    for first in [0, 8, 16] {
        let mut six = out.chunks_exact_mut(6);
        let mut row = 0;
        for out in &mut six {
            tile::<6, 8>(&a[row * stride..], stride, x, out, first);
            row += 6;
        }
        for out in six.into_remainder().chunks_exact_mut(1) {
            tile::<1, 8>(&a[row * stride..], stride, x, out, first);
            row += 1;
        }
    }
}

/// `R` rows by `W` columns from `first` on.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn tile<const R: usize, const W: usize>(
    a: &[f64],
    stride: usize,
    x: &[[f64; DOUBLE_PANEL]],
    out: &mut [[f64; DOUBLE_PANEL]],
    first: usize,
) {
    let rows: [&[f64]; R] = std::array::from_fn(|r| &a[r * stride..][..x.len()]);
    let mut sums = [[0.0f64; W]; R];
    for (k, x) in x.iter().enumerate() {
        let lanes: [f64; W] = std::array::from_fn(|c| x[first + c]);
        for (sums, row) in sums.iter_mut().zip(rows) {
            let w = row[k];
            for (sum, lane) in sums.iter_mut().zip(lanes) {
                *sum = w.mul_add(lane, *sum);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        out[first..first + W].copy_from_slice(&sums);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::values;

    proptest! {
        #[test]
        fn every_path_adds_in_the_same_order(
            rows in 0usize..30, cols in prop_oneof![0usize..70, 70usize..300], gap in 0usize..5, seed: u64,
        ) {
            let stride = cols + gap;
            // Of single precision, with extremes: their products need all bits of a double.
            let double = |seed, count| -> Vec<f64> {
                values(seed, count).iter().zip(values(seed ^ 7, count)).map(|(a, b)| f64::from(*a) * f64::from(b)).collect()
            };
            let a = double(seed, rows * stride);
            let x: Vec<[f64; DOUBLE_PANEL]> = double(seed ^ 1, cols * DOUBLE_PANEL)
                .chunks_exact(DOUBLE_PANEL)
                .map(|c| std::array::from_fn(|i| c[i]))
                .collect();
            let mut expected = vec![[f64::NAN; DOUBLE_PANEL]; rows];
            reference(&a, stride, &x, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![[f64::NAN; DOUBLE_PANEL]; rows];
                multiply_with(isa, &a, stride, &x, &mut out);
                let same = out.iter().flatten().zip(expected.iter().flatten())
                    .all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
                prop_assert!(same, "{isa:?}");
            }
        }
    }
}
