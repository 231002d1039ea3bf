//! Matrices that other tools quantised: their codes are brought into memory when the model is opened.
//!
//! ```text
//! abq holds the numbers   --> multiplied from the codes, as after `convert --to abq`
//! it does not (act-order) --> rows decoded from the codes in memory, rounded to the dtype of the matrix
//! ```

use std::ops::Range;

use llmpress_formats::foreign::Held;
use llmpress_formats::{Checkpoint, Dtype, Encoding, Result};
use llmpress_kernels::cpu::Elements;

use super::abq::Quantised;
use super::source::{Source, Stored, buffer, typed};

/// A matrix whose rows are decoded from codes in memory.
#[derive(Debug)]
struct Kept {
    held: Held,
    dtype: Dtype,
    cols: usize,
}

/// Opens such a matrix: everything is read once.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    if !matches!(stored.encoding()?, Encoding::Foreign(_)) {
        return Ok(None);
    }
    let Some(codes) = stored.checkpoint.codes(stored.tensor)? else { return Ok(None) };
    let held = codes.held()?;
    if let Ok(packed) = held.packed() {
        return Quantised::of(stored, packed);
    }
    Ok(Some(Box::new(Kept { held, dtype: stored.dtype, cols: stored.cols })))
}

impl Source for Kept {
    fn elements<'a>(
        &'a self,
        _checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let bytes = buffer(words, rows.len() * self.cols * self.dtype.bits() as usize / 8);
        self.held.read_rows(rows, bytes)?;
        Ok(typed(bytes, self.dtype).unwrap_or(Elements::F32(&[])))
    }

    fn in_place(&self) -> bool {
        false
    }
}
