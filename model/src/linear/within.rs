//! A matrix of floats inside of another encoding: mapped, or codes in memory.

use std::ops::Range;

use llmpress_formats::encoding::abq;
use llmpress_formats::{Checkpoint, Dtype, Error, Result};
use llmpress_kernels::cpu::Elements;
use llmpress_kernels::cpu::abq::Matrix;

use super::abq::Quantised;
use super::source::{part, typed};

/// Some of a unit's numbers, rows of `cols`.
#[derive(Debug)]
pub(super) enum Floats {
    /// A component, read where it lies.
    Mapped { unit: String, component: &'static str, dtype: Dtype, cols: usize },
    /// Codes, decoded row by row when they are multiplied.
    Codes(Matrix),
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

    /// Codes, regrouped; they were checked when they were read.
    pub(super) fn codes(packed: abq::Packed<'_>) -> Result<Self> {
        Ok(Self::Codes(Quantised::matrix(packed)?))
    }

    /// Some rows: where they lie, or decoded into `decoded`.
    pub(super) fn rows<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        decoded: &'a mut Vec<f32>,
    ) -> Result<Elements<'a>> {
        match self {
            Self::Mapped { unit, component, dtype, cols } => {
                let all = typed(checkpoint.view(unit, component)?, *dtype);
                let all = all.ok_or_else(|| {
                    Error::Invalid(format!("unit {unit}: {component} is not aligned to {}", dtype.name()))
                })?;
                Ok(part(all, rows.start * cols..rows.end * cols))
            }
            Self::Codes(matrix) => {
                let cols = matrix.cols();
                decoded.resize(rows.len() * cols, 0.0);
                for (row, out) in rows.zip(decoded.chunks_exact_mut(cols.max(1))) {
                    matrix.row(row, out);
                }
                Ok(Elements::F32(decoded))
            }
        }
    }
}
