//! A matrix of floats inside of another encoding, mapped.

use std::ops::Range;

use llmpress_formats::{Checkpoint, Dtype, Error, Result};
use llmpress_kernels::cpu::Elements;

use super::source::{part, typed};

/// Some of a unit's numbers, rows of `cols`, read where they lie.
#[derive(Debug)]
pub(super) struct Floats {
    unit: String,
    component: &'static str,
    dtype: Dtype,
    cols: usize,
}

impl Floats {
    /// A component whose elements are aligned; `None` where they are not.
    pub(super) fn mapped(
        checkpoint: &Checkpoint,
        unit: &str,
        component: &'static str,
        dtype: Dtype,
        cols: usize,
    ) -> Result<Option<Self>> {
        let aligned = typed(checkpoint.view(unit, component)?, dtype).is_some();
        Ok(aligned.then(|| Self { unit: unit.to_owned(), component, dtype, cols }))
    }

    /// Some rows.
    pub(super) fn rows<'a>(&self, checkpoint: &'a Checkpoint, rows: Range<usize>) -> Result<Elements<'a>> {
        let all = typed(checkpoint.view(&self.unit, self.component)?, self.dtype);
        let all = all.ok_or_else(|| {
            let (unit, component) = (&self.unit, self.component);
            Error::Invalid(format!("unit {unit}: {component} is not aligned to {}", self.dtype.name()))
        })?;
        Ok(part(all, rows.start * self.cols..rows.end * self.cols))
    }
}
