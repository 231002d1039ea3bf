//! The exponential function in plain operations that a compiler turns into vectors.
//!
//! ```text
//! e^x = 2^n e^r,   n = round(x / ln 2),   |r| <= ln 2 / 2,   e^r by its series to the seventh power
//! ```

use super::isa::{Isa, multiversion};

/// `e^x` within 2 units in the last place: 0 below -104, infinity above 88.73, NaN for NaN. The same bits on
/// every processor.
#[must_use]
pub fn exp(x: f32) -> f32 {
    multiversion!(Isa::detect(), exp_inline(x: f32) -> f32)
}

/// [`exp`] for loops that are compiled for several instruction sets.
#[inline(always)]
pub(super) fn exp_inline(x: f32) -> f32 {
    // Beyond these the result is 0 or infinity all the same. A NaN passes both comparisons.
    let x = if x < -105.0 { -105.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    // Adding 1.5 * 2^23 leaves the rounded quotient in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let whole = shifted - ROUND;
    // ln 2 in two parts, the first of which has few enough bits that its product is exact.
    let r = whole.mul_add(-0.693_359_4, x);
    let r = whole.mul_add(2.121_944_4e-4, r);
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = r.mul_add(sum, coefficient);
    }
    // In two steps: the power of two may lie outside of the normal numbers.
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    sum * power(half) * power(n.wrapping_sub(half))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_two_units_in_the_last_place_everywhere() {
        let mut worst = 0.0f64;
        // Every 97th number of either sign.
        for bits in (0..=u32::MAX).step_by(97) {
            let x = f32::from_bits(bits);
            let (found, exact) = (exp(x), f64::from(x).exp());
            if x.is_nan() {
                assert!(found.is_nan());
            } else if exact > f64::from(f32::MAX) * (1.0 + 1e-7) {
                assert_eq!(found, f32::INFINITY, "{x}");
            } else {
                let unit = f64::from(f32::from_bits((exact as f32).to_bits().max(1)).next_up())
                    - f64::from(exact as f32);
                let unit = if unit.is_finite() { unit } else { 2f64.powi(104) };
                worst = worst.max((f64::from(found) - exact).abs() / unit);
                assert!(worst < 2.0, "{x}: {found} for {exact}");
            }
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    }
}
