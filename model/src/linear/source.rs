//! What a product asks of stored weights, whatever their encoding.

use std::fmt::Debug;
use std::ops::Range;

use llmpress_formats::{Checkpoint, Dtype, Encoding, Result, Tensor};
use llmpress_kernels::cpu::{Elements, dot_rows};

use super::abq::Quantised;

/// A matrix that is to be opened: its tensor by the name that it is stored under, of a dtype that products take.
pub(super) struct Stored<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) tensor: &'a str,
    pub(super) info: &'a Tensor,
    pub(super) dtype: Dtype,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Stored<'_> {
    pub(super) fn encoding(&self) -> Result<&Encoding> {
        Ok(self.checkpoint.unit_of(self.info)?.encoding())
    }
}

/// Opens a matrix in place, if it is of one's encoding and lies so that it can be read there.
pub(super) type Open = fn(&Stored<'_>) -> Result<Option<Box<dyn Source>>>;

/// Where the weights of a matrix come from.
pub(super) trait Source: Debug + Send + Sync {
    /// The weights of some rows: where they lie, or decoded into `words`.
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>>;

    /// The product of some rows with one token.
    fn dot(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
        words: &mut Vec<u64>,
    ) -> Result<()> {
        let elements = self.elements(checkpoint, rows, words)?;
        dot_rows(elements, x.len(), x, out);
        Ok(())
    }

    /// What it is where products run from codes and not from weights: their inputs are prepared first.
    fn quantised(&self) -> Option<&Quantised> {
        None
    }

    /// Whether any rows cost as much as all of them.
    fn at_once(&self) -> bool {
        false
    }

    /// Whether a product with one token reads the weights where they lie.
    fn in_place(&self) -> bool {
        true
    }
}

/// Room for so many bytes, aligned for every dtype.
pub(super) fn buffer(words: &mut Vec<u64>, bytes: usize) -> &mut [u8] {
    words.resize(bytes.div_ceil(8), 0);
    &mut bytemuck::cast_slice_mut::<u64, u8>(words)[..bytes]
}

/// Some of the elements.
pub(super) fn part(elements: Elements<'_>, range: Range<usize>) -> Elements<'_> {
    match elements {
        Elements::F32(x) => Elements::F32(&x[range]),
        Elements::Bf16(x) => Elements::Bf16(&x[range]),
        Elements::F16(x) => Elements::F16(&x[range]),
    }
}

/// Bytes as elements; `None` where their address or dtype forbids it.
pub(super) fn typed(bytes: &[u8], dtype: Dtype) -> Option<Elements<'_>> {
    Some(match dtype {
        Dtype::F32 => Elements::F32(bytemuck::try_cast_slice(bytes).ok()?),
        Dtype::BF16 => Elements::Bf16(bytemuck::try_cast_slice(bytes).ok()?),
        Dtype::F16 => Elements::F16(bytemuck::try_cast_slice(bytes).ok()?),
        _ => return None,
    })
}
