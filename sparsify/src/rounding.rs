//! Values as they are stored: in the dtype of their tensor, to the nearest, of two to the even one.

use half::{bf16, f16};
use llmpress_formats::{Dtype, Error, Result};
use rayon::prelude::*;

/// The nearest value of a dtype; infinite where it has none so large.
#[inline]
pub(crate) fn rounded(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Rounds all values in place.
///
/// # Errors
/// One that is NaN, infinite, or too large for the dtype.
pub(crate) fn round_all(values: &mut [f32], dtype: Dtype) -> Result<()> {
    values.par_iter_mut().with_min_len(1 << 14).for_each(|value| *value = rounded(*value, dtype));
    match values.par_iter().with_min_len(1 << 14).all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(Error::Invalid(format!("a weight would be NaN, or too large for {}", dtype.name()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_to_the_nearest_and_too_large_ones_refused() {
        let mut values = [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.0, 1e-40];
        round_all(&mut values, Dtype::BF16).unwrap();
        assert_eq!(values[..3], [1.0, 1.0, 1.0 + 4.0 / 256.0]);
        assert!(values[3].is_sign_negative());
        assert!(round_all(&mut [1e5], Dtype::F16).unwrap_err().to_string().contains("F16"));
        assert!(round_all(&mut [1e5], Dtype::BF16).is_ok());
        assert!(round_all(&mut [f32::MAX], Dtype::BF16).is_err());
        assert!(round_all(&mut [f32::MAX], Dtype::F32).is_ok());
        assert!(round_all(&mut [f32::NAN], Dtype::F32).is_err());
    }
}
