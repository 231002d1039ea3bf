//! Plain matrices in device memory, as products read them.

use std::borrow::Cow;

use bytemuck::{NoUninit, Zeroable};

use super::{Buffer, Error, Gpu, Result};

/// What a plain matrix is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Element {
    /// BF16: multiplied as it is.
    #[default]
    Bf16,
    /// F16: two BF16 of the same sum.
    F16,
    /// F32: three BF16 of the same sum, but for what lies below 2^-133.
    F32,
}

impl Element {
    /// Bytes of one.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The source of its products, without `.cu`.
    pub(super) fn file(self) -> &'static str {
        match self {
            Self::Bf16 => "dense",
            Self::F16 => "dense_f16",
            Self::F32 => "dense_f32",
        }
    }
}

/// Elements from one row to the next: the columns, and zeros up to a multiple of 8. Where `cols` is one, as nearly always, that
/// is the plain row-major matrix.
#[must_use]
pub fn row_stride(cols: usize) -> usize {
    cols.next_multiple_of(8)
}

/// A row-major matrix with rows of [`row_stride`] elements.
#[must_use]
pub fn padded<T: Zeroable + Copy>(cols: usize, elements: &[T]) -> Cow<'_, [T]> {
    let stride = row_stride(cols);
    if stride == cols {
        return Cow::Borrowed(elements);
    }
    let mut padded = vec![T::zeroed(); elements.len() / cols * stride];
    for (to, from) in padded.chunks_mut(stride).zip(elements.chunks_exact(cols)) {
        to[..cols].copy_from_slice(from);
    }
    Cow::Owned(padded)
}

/// Copies a row-major matrix to the device, its rows [`row_stride`] apart: BF16 or F16 words, or F32.
///
/// # Errors
/// [`Error::Invalid`] where there are not `rows` x `cols` elements; not so much memory.
pub fn upload<T: NoUninit + Zeroable>(gpu: &Gpu, rows: usize, cols: usize, elements: &[T]) -> Result<Buffer> {
    if rows.checked_mul(cols) != Some(elements.len()) {
        return Err(Error::Invalid(format!("{} words for a matrix of {rows} x {cols}", elements.len())));
    }
    gpu.upload(&padded(cols, elements))
}
