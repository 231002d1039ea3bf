//! Activations to codes: dynamic, asymmetric, a grid a token.
//!
//! ```text
//! s = (max(x, 0) - min(x, 0)) / (2^q - 1)     z = round(-min / s)     code = round(x / s) + z, clamped to 0 .. 2^q - 1
//! ```

use crate::cpu::isa::{Isa, multiversion};

/// A value that is NaN or infinite, or so large that the range of its token is.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("an activation is NaN or infinite, or too large to quantise (token {token} of its panel)")]
pub struct NotFinite {
    /// The token, counted within what was quantised.
    pub token: usize,
}

/// The grid of a token: `x` is about `step * (code - zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Distance of two codes; 1 where all values are 0.
    pub step: f32,
    /// The code of 0.
    pub zero: u8,
}

impl Grid {
    /// Of values from `low` <= 0 to `high` >= 0. All arithmetic is in single precision, rounded after each operation, and values
    /// half way between two codes go to the even multiple of the step.
    pub(super) fn new(low: f32, high: f32, bits: u8) -> Option<Self> {
        let most = most(bits);
        let step = (high - low) / most;
        let step = if step == 0.0 { 1.0 } else { step };
        step.is_finite().then(|| Self { step, zero: (-low / step).round_ties_even().clamp(0.0, most) as u8 })
    }
}

/// The largest code.
pub(super) fn most(bits: u8) -> f32 {
    f32::from(u8::MAX >> (8 - bits))
}

/// Quantises one token to codes of `bits` bits.
///
/// # Errors
/// A value that is NaN or infinite.
///
/// # Panics
/// Where `bits` is not 1 to 8 or `codes` is not as long as `x`.
pub fn quantise(x: &[f32], bits: u8, codes: &mut [u8]) -> Result<Grid, NotFinite> {
    quantise_with(Isa::detect(), x, bits, codes)
}

pub(super) fn quantise_with(isa: Isa, x: &[f32], bits: u8, codes: &mut [u8]) -> Result<Grid, NotFinite> {
    assert!((1..=8).contains(&bits) && codes.len() == x.len());
    let (low, high, finite) = multiversion!(isa, range(x: &[f32]) -> (f32, f32, bool));
    let grid = Grid::new(low, high, bits).filter(|_| finite).ok_or(NotFinite { token: 0 })?;
    multiversion!(isa, to_codes(x: &[f32], grid: Grid, bits: u8, codes: &mut [u8]));
    Ok(grid)
}

/// The least value or 0, the greatest or 0, and whether all are finite.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32, bool) {
    const LANES: usize = 16;
    let (mut low, mut high, mut above) = ([0.0f32; LANES], [0.0f32; LANES], [0u32; LANES]);
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut take = |lane: usize, x: f32| {
        low[lane] = if x < low[lane] { x } else { low[lane] };
        high[lane] = if x > high[lane] { x } else { high[lane] };
        above[lane] = above[lane].max(x.to_bits() & 0x7fff_ffff);
    };
    for chunk in chunks {
        for (lane, x) in chunk.iter().enumerate() {
            take(lane, *x);
        }
    }
    for (lane, x) in rest.iter().enumerate() {
        take(lane, *x);
    }
    let least = low.iter().fold(0.0f32, |a, b| a.min(*b));
    let greatest = high.iter().fold(0.0f32, |a, b| a.max(*b));
    (least, greatest, above.iter().all(|bits| *bits < f32::INFINITY.to_bits()))
}

#[inline(always)]
fn to_codes(x: &[f32], grid: Grid, bits: u8, codes: &mut [u8]) {
    let (most, zero) = (most(bits), f32::from(grid.zero));
    for (code, x) in codes.iter_mut().zip(x) {
        *code = code_of(*x, grid.step, zero, most);
    }
}

/// The code of a finite value.
#[inline(always)]
pub(super) fn code_of(x: f32, step: f32, zero: f32, most: f32) -> u8 {
    let code = ((x / step).round_ties_even() + zero).clamp(0.0, most);
    // 1.5 * 2^23: an integer added to it stands in the lowest bits.
    (code + 12_582_912.0).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_follow_the_definition_on_every_path(
            len in 0usize..130, bits in 1u8..=8, magnitude in -30i32..30, seed: u64, odd in 0usize..400,
        ) {
            let mut x: Vec<f32> = (0..len as u64)
                .map(|i| {
                    let r = (seed ^ i << 7).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    (r as i32 as f32 / 2f32.powi(31)) * 2f32.powi(magnitude)
                })
                .collect();
            let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MAX, f32::MIN_POSITIVE / 8.0]
                .get(odd).copied().inspect(|odd| x.push(*odd));
            let low = x.iter().fold(0.0f32, |a, b| a.min(*b));
            let high = x.iter().fold(0.0f32, |a, b| a.max(*b));
            let most = 2f32.powi(bits.into()) - 1.0;
            let step = if high == low { 1.0 } else { (high - low) / most };
            for isa in Isa::available() {
                let mut codes = vec![0; x.len()];
                let grid = quantise_with(isa, &x, bits, &mut codes);
                if odd.is_some_and(|x| !x.is_finite()) {
                    prop_assert_eq!(grid, Err(NotFinite { token: 0 }));
                    continue;
                }
                let grid = grid.unwrap();
                let step = if step == 0.0 { 1.0 } else { step };
                prop_assert_eq!(grid.step, step);
                prop_assert_eq!(f32::from(grid.zero), (-low / step).round_ties_even());
                for (x, code) in x.iter().zip(&codes) {
                    let expected = ((x / step).round_ties_even() + f32::from(grid.zero)).clamp(0.0, most);
                    prop_assert_eq!(f32::from(*code), expected, "{:?} {}", isa, x);
                    // Half a step, and what the rounding of zero moves at the ends.
                    let near = f64::from(step) * (f64::from(*code) - f64::from(grid.zero));
                    prop_assert!((near - f64::from(*x)).abs() <= f64::from(step) * 1.001);
                }
            }
        }
    }

    #[test]
    fn nothing_and_zeros_have_a_grid() {
        assert_eq!(quantise(&[], 8, &mut []), Ok(Grid { step: 1.0, zero: 0 }));
        let mut codes = [9; 3];
        assert_eq!(quantise(&[0.0, -0.0, 0.0], 4, &mut codes), Ok(Grid { step: 1.0, zero: 0 }));
        assert_eq!(codes, [0; 3]);
    }

    #[test]
    fn a_range_beyond_single_precision_is_refused() {
        assert_eq!(quantise(&[f32::MAX, f32::MIN], 8, &mut [0; 2]), Err(NotFinite { token: 0 }));
    }
}
