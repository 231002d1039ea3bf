//! Plain weights, mapped and read where they lie.

use std::ops::Range;

use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result, encoding};
use llmpress_kernels::cpu::Elements;

use super::source::{Source, Stored, part, typed};

#[derive(Debug)]
struct Raw {
    unit: String,
    dtype: Dtype,
    cols: usize,
}

/// Opens a raw matrix whose elements are aligned.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    let Encoding::Raw = stored.encoding()? else { return Ok(None) };
    // Checks that the component is what the tensor says, so that a faulty unit is found now.
    stored.checkpoint.read(stored.tensor, 0, &mut [])?;
    let raw = Raw { unit: stored.info.unit.clone(), dtype: stored.dtype, cols: stored.cols };
    Ok(raw.all(stored.checkpoint).is_ok().then(|| Box::new(raw) as Box<dyn Source>))
}

impl Raw {
    fn all<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Elements<'a>> {
        typed(checkpoint.view(&self.unit, encoding::raw::DATA)?, self.dtype).ok_or_else(|| {
            Error::Invalid(format!("unit {} does not lie on whole {} elements", self.unit, self.dtype.name()))
        })
    }
}

impl Source for Raw {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        _words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let range = rows.start * self.cols..rows.end * self.cols;
        Ok(part(self.all(checkpoint)?, range))
    }
}
