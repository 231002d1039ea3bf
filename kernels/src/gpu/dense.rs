//! Matrices of plain BF16 in device memory, as products read them.

use std::borrow::Cow;

use super::{Buffer, Error, Gpu, Result};

/// Elements from one row to the next: the columns, and zeros up to a multiple of 8. Where `cols` is one, as nearly always, that
/// is the plain row-major matrix.
#[must_use]
pub fn row_stride(cols: usize) -> usize {
    cols.next_multiple_of(8)
}

/// Copies a row-major matrix of BF16 words to the device, its rows [`row_stride`] apart.
///
/// # Errors
/// [`Error::Invalid`] where there are not `rows` x `cols` words; not so much memory.
pub fn upload(gpu: &Gpu, rows: usize, cols: usize, words: &[u16]) -> Result<Buffer> {
    if rows.checked_mul(cols) != Some(words.len()) {
        return Err(Error::Invalid(format!("{} words for a matrix of {rows} x {cols}", words.len())));
    }
    let stride = row_stride(cols);
    let padded = if stride == cols {
        Cow::Borrowed(words)
    } else {
        let mut padded = vec![0; rows * stride];
        for (to, from) in padded.chunks_mut(stride).zip(words.chunks(cols)) {
            to[..cols].copy_from_slice(from);
        }
        Cow::Owned(padded)
    };
    gpu.upload(&padded)
}
