//! A matrix of floats inside of another encoding: mapped, or codes that were decoded when the model was opened.

use std::ops::Range;

use llmpress_formats::encoding::abq;
use llmpress_formats::{Checkpoint, Dtype, Error, Result};
use llmpress_kernels::cpu::Elements;
use rayon::prelude::*;

use super::source::{part, typed};

/// Some of a unit's numbers, rows of `cols`.
#[derive(Debug)]
pub(super) enum Floats {
    /// A component, read where it lies.
    Mapped { unit: String, component: &'static str, dtype: Dtype, cols: usize },
    /// What codes stand for, in single precision: decoding them for every token takes many times as long as the product.
    Decoded { values: Vec<f32>, cols: usize },
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
        Ok(aligned.then(|| Self::Mapped { unit: unit.to_owned(), component, dtype, cols }))
    }

    /// Codes, decoded.
    pub(super) fn decode(packed: &abq::Packed<'_>) -> Result<Self> {
        let cols = packed.cols();
        let mut values = vec![0.0; packed.rows() * cols];
        let rows = values.par_chunks_exact_mut(cols.max(1)).enumerate();
        rows.try_for_each(|(row, out)| packed.decode_row(row, out))?;
        Ok(Self::Decoded { values, cols })
    }

    /// Some rows.
    pub(super) fn rows<'a>(&'a self, checkpoint: &'a Checkpoint, rows: Range<usize>) -> Result<Elements<'a>> {
        match self {
            Self::Mapped { unit, component, dtype, cols } => {
                let all = typed(checkpoint.view(unit, component)?, *dtype);
                let all = all.ok_or_else(|| {
                    Error::Invalid(format!("unit {unit}: {component} is not aligned to {}", dtype.name()))
                })?;
                Ok(part(all, rows.start * cols..rows.end * cols))
            }
            Self::Decoded { values, cols } => Ok(Elements::F32(&values[rows.start * cols..rows.end * cols])),
        }
    }
}
