//! Activations rounded to a few bits and back: each column by itself (OmniQuant, section 3; dynamic and asymmetric).
//!
//! ```text
//! lo, hi = extremes of a column and 0     s = (hi - lo) / (2^bits - 1)     z = -lo / s     x -> s (clamp(x / s + z) - z)
//! ```

use super::isa::{Isa, multiversion};

/// Columns whose grids are kept side by side.
pub(super) const MOST: usize = super::PANEL;

/// Quantises each of `width` columns of `x`, `x[row * width + column]`, to `bits` and back in place; false, and `x` unspecified, where
/// a value is NaN or infinite, or a column too wide for single precision.
///
/// With lo the least and hi the greatest of 0 and a column, s = (hi - lo) / (2^bits - 1), or 1 where that is 0, and z = -lo / s rounded,
/// x becomes s (c - z) with c = x / s rounded, plus z, held between 0 and 2^bits - 1. Ties go to even.
///
/// # Panics
/// Where `width` is not 1 to [`super::PANEL`], `x` has no whole rows, or `bits` is not 1 to 8.
pub fn quantize_columns(x: &mut [f32], width: usize, bits: u8) -> bool {
    quantize_with(Isa::detect(), x, width, bits)
}

/// Scale and zero point of each of `width` columns, for codes up to `top`; false where a value is NaN or infinite, or a column too
/// wide for single precision.
#[inline(always)]
pub(super) fn grids(
    x: &[f32],
    width: usize,
    top: f32,
    scale: &mut [f32; MOST],
    zero: &mut [f32; MOST],
) -> bool {
    let (mut low, mut high) = ([0.0f32; MOST], [0.0f32; MOST]);
    // A sum with a NaN or an infinity in it is neither 0 nor finite.
    let mut odd = [0.0f32; MOST];
    for row in x.chunks_exact(width) {
        for (((x, low), high), odd) in row.iter().zip(&mut low).zip(&mut high).zip(&mut odd) {
            *low = if *x < *low { *x } else { *low };
            *high = if *x > *high { *x } else { *high };
            *odd += *x * 0.0;
        }
    }
    for column in 0..width {
        let s = (high[column] - low[column]) / top;
        if odd[column] != 0.0 || !s.is_finite() {
            return false;
        }
        scale[column] = if s == 0.0 { 1.0 } else { s };
        zero[column] = (-low[column] / scale[column]).round_ties_even();
    }
    true
}

fn quantize_with(isa: Isa, x: &mut [f32], width: usize, bits: u8) -> bool {
    #[inline(always)]
    fn body(x: &mut [f32], width: usize, top: f32) -> bool {
        let (mut scale, mut zero) = ([1.0f32; MOST], [0.0f32; MOST]);
        if !grids(x, width, top, &mut scale, &mut zero) {
            return false;
        }
        for row in x.chunks_exact_mut(width) {
            for ((x, s), z) in row.iter_mut().zip(&scale).zip(&zero) {
                let code = ((*x / s).round_ties_even() + z).max(0.0).min(top);
                *x = s * (code - z);
            }
        }
        true
    }
    assert!((1..=MOST).contains(&width) && x.len().is_multiple_of(width) && (1..=8).contains(&bits));
    let top = ((1u32 << bits) - 1) as f32;
    multiversion!(isa, body(x: &mut [f32], width: usize, top: f32) -> bool)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::test_values::{same_bits, values};

    /// One column by the definition.
    fn reference(x: &[f32], bits: u8) -> Option<Vec<f32>> {
        if x.iter().any(|x| !x.is_finite()) {
            return None;
        }
        let low = x.iter().copied().fold(0.0f32, f32::min);
        let high = x.iter().copied().fold(0.0f32, f32::max);
        let top = (1u32 << bits) as f32 - 1.0;
        let s = (high - low) / top;
        if !s.is_finite() {
            return None;
        }
        let s = if s == 0.0 { 1.0 } else { s };
        let z = (-low / s).round_ties_even();
        Some(x.iter().map(|x| s * (((x / s).round_ties_even() + z).clamp(0.0, top) - z)).collect())
    }

    proptest! {
        #[test]
        fn every_path_gives_the_bits_of_the_definition(rows in 0usize..70, width in 1usize..49, bits in 1u8..9, seed: u64) {
            let x = values(seed, rows * width);
            let columns: Vec<Option<Vec<f32>>> = (0..width)
                .map(|c| reference(&x.iter().skip(c).step_by(width).copied().collect::<Vec<_>>(), bits))
                .collect();
            for isa in Isa::available() {
                let mut out = x.clone();
                let good = quantize_with(isa, &mut out, width, bits);
                prop_assert_eq!(good, columns.iter().all(Option::is_some), "{:?}", isa);
                for (c, column) in columns.iter().enumerate().filter(|_| good) {
                    let found: Vec<f32> = out.iter().skip(c).step_by(width).copied().collect();
                    prop_assert!(same_bits(&found, column.as_deref().unwrap()), "{isa:?} {c}");
                }
            }
        }
    }

    #[test]
    fn values_move_by_half_a_step_at_most_and_what_is_on_the_grid_stays() {
        let mut x = [-1.0, -0.26, 0.0, 0.3, 2.0];
        assert!(quantize_columns(&mut x, 1, 2));
        assert_eq!(x, [-1.0, 0.0, 0.0, 0.0, 2.0]);
        let mut same = [5.0f32; 8];
        assert!(quantize_columns(&mut same, 2, 1));
        assert_eq!(same, [5.0; 8]);
        let mut none = [0.0f32, -0.0];
        assert!(quantize_columns(&mut none, 1, 4));
        assert_eq!(none, [0.0; 2]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!quantize_columns(&mut [1.0, bad, 2.0, 3.0], 2, 8));
        }
        assert!(!quantize_columns(&mut [f32::MAX, f32::MIN], 1, 1));
    }
}
