//! Weights of any encoding, decoded some rows at a time.

use std::ops::Range;

use llmpress_formats::{Checkpoint, Dtype, Result};
use llmpress_kernels::cpu::Elements;

use super::source::{Source, Stored, buffer, typed};

#[derive(Debug)]
pub(super) struct Decoded {
    tensor: String,
    dtype: Dtype,
    cols: usize,
}

impl Decoded {
    pub(super) fn new(stored: &Stored<'_>) -> Self {
        Self { tensor: stored.tensor.to_owned(), dtype: stored.dtype, cols: stored.cols }
    }
}

impl Source for Decoded {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let bytes = buffer(words, rows.len() * self.cols * self.dtype.bits() as usize / 8);
        checkpoint.read_rows(&self.tensor, rows.start as u64..rows.end as u64, bytes)?;
        Ok(typed(bytes, self.dtype).unwrap_or(Elements::F32(&[])))
    }

    fn in_place(&self) -> bool {
        false
    }
}
