//! Scales and offsets as they are stored.

use std::borrow::Cow;

use half::{bf16, f16};

use super::DTYPES;
use crate::{Dtype, Error, Result};

/// Numbers in F16, BF16 or F32: little-endian bytes of no alignment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Floats<'a> {
    dtype: Dtype,
    bytes: Cow<'a, [u8]>,
}

impl<'a> Floats<'a> {
    /// Takes bytes as they are stored.
    ///
    /// # Errors
    /// Another dtype, or half an element.
    pub fn new(dtype: Dtype, bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self> {
        let bytes = bytes.into();
        if !DTYPES.contains(&dtype) || bytes.len() % width(dtype) != 0 {
            return Err(Error::Invalid(format!(
                "{} bytes of {}: abq has scales and offsets in F16, BF16 and F32",
                bytes.len(),
                dtype.name()
            )));
        }
        Ok(Self { dtype, bytes })
    }

    /// Rounds values to a dtype: to the nearest, of two to the even one.
    ///
    /// # Errors
    /// Another dtype; a value that is not finite, before or after.
    pub fn round(dtype: Dtype, values: &[f32]) -> Result<Floats<'static>> {
        let mut bytes = vec![0; values.len() * width(dtype)];
        write_rounded(dtype, values, &mut bytes);
        let floats = Floats::new(dtype, bytes)?;
        match floats.first_not_finite() {
            None => Ok(floats),
            Some(at) => {
                Err(Error::Invalid(format!("value {at}, {}, is not finite in {}", values[at], dtype.name())))
            }
        }
    }

    /// Their dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// As they are stored.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.bytes.len() / width(self.dtype)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// One of them, exactly; 0 past the end.
    pub fn get(&self, index: usize) -> f32 {
        let width = width(self.dtype);
        match (index.checked_mul(width).and_then(|at| self.bytes.get(at..)?.get(..width)), self.dtype) {
            (Some(&[a, b]), Dtype::F16) => f16::from_le_bytes([a, b]).to_f32(),
            (Some(&[a, b]), _) => bf16::from_le_bytes([a, b]).to_f32(),
            (Some(&[a, b, c, d]), _) => f32::from_le_bytes([a, b, c, d]),
            _ => 0.0,
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = f32> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    /// The first that is infinite or not a number.
    pub(in crate::encoding) fn first_not_finite(&self) -> Option<usize> {
        self.iter().position(|x| !x.is_finite())
    }

    /// The same numbers, not borrowed.
    pub fn into_owned(self) -> Floats<'static> {
        Floats { dtype: self.dtype, bytes: Cow::Owned(self.bytes.into_owned()) }
    }
}

/// Bytes an element.
pub(in crate::encoding) fn width(dtype: Dtype) -> usize {
    (dtype.bits() as usize / 8).max(1)
}

/// Writes values in F16, BF16 or F32, rounded to the nearest, of two to the even one.
pub(crate) fn write_rounded(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    match dtype {
        Dtype::F16 => each::<2>(values, out, |x| f16::from_f32(x).to_le_bytes()),
        Dtype::BF16 => each::<2>(values, out, |x| bf16::from_f32(x).to_le_bytes()),
        _ => each::<4>(values, out, f32::to_le_bytes),
    }
}

fn each<const W: usize>(values: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; W]) {
    for (&value, out) in values.iter().zip(out.chunks_exact_mut(W)) {
        out.copy_from_slice(&bytes(value));
    }
}
