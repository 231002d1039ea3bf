//! sparse24: one token is multiplied from kept values and positions, more from rows in single precision.
//!
//! ```text
//! plain values:   mapped, read where they lie
//! abq values:     decoded into memory when the model is opened
//! fixed12 values: some rows are decoded into memory
//! ```

use std::ops::Range;

use llmpress_formats::encoding::abq;
use llmpress_formats::encoding::sparse24::{Inner, Kept, POSITIONS, Packed, QUAD, VALUES};
use llmpress_formats::{Checkpoint, Encoding, Error, Result};
use llmpress_kernels::cpu::{Elements, Sparse24, dot_sparse24};

use super::source::{Source, Stored, typed};
use super::within::Floats;

/// A matrix of which two in four are kept: a unit by itself, or the base of another one.
#[derive(Debug)]
pub(super) struct Sparse {
    tensor: String,
    unit: String,
    cols: usize,
    /// The component of positions, and how to read rows that cannot be multiplied where they lie.
    positions: &'static str,
    packed: Rows,
    values: Values,
}

#[derive(Debug)]
enum Values {
    There(Floats),
    /// Decoded whenever they are multiplied.
    Decoded,
}

/// Reads some rows of a tensor as they are stored.
pub(super) type Rows = fn(&Checkpoint, &str, Range<u64>) -> Result<Packed<'static>>;

/// Opens a sparse24 matrix.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    let Encoding::Sparse24(sparse) = *stored.encoding()? else { return Ok(None) };
    let read: Rows = |checkpoint, tensor, rows| checkpoint.sparse_rows(tensor, rows);
    let sparse = Sparse::open(stored, sparse.values, (POSITIONS, VALUES), read)?;
    Ok(sparse.map(|sparse| Box::new(sparse) as Box<dyn Source>))
}

impl Sparse {
    /// Finds the components, by their names in the unit. `None` where values are not aligned.
    pub(super) fn open(
        stored: &Stored<'_>,
        values: Option<Inner>,
        (positions, plain): (&'static str, &'static str),
        packed: Rows,
    ) -> Result<Option<Self>> {
        let (checkpoint, unit) = (stored.checkpoint, &stored.info.unit);
        // Also checks the sizes of all components, so that a faulty unit is found now.
        checkpoint.read(stored.tensor, 0, &mut [])?;
        let values = match values {
            None => {
                Floats::mapped(checkpoint, unit, plain, stored.dtype, stored.cols / 2)?.map(Values::There)
            }
            Some(Inner::Fixed12 { .. }) => Some(Values::Decoded),
            Some(Inner::Abq(_)) => {
                let all = packed(checkpoint, stored.tensor, 0..stored.rows as u64)?;
                match all.values() {
                    Kept::Abq(codes) => Some(Values::There(Floats::decode(codes)?)),
                    Kept::Plain(_) => None,
                }
            }
        };
        Ok(values.map(|values| Self {
            tensor: stored.tensor.to_owned(),
            unit: unit.clone(),
            cols: stored.cols,
            positions,
            packed,
            values,
        }))
    }

    /// Does something with some rows as they are stored.
    fn with<T>(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        then: impl FnOnce(&Sparse24<'_>) -> Result<T>,
    ) -> Result<T> {
        let Range { start, end } = rows;
        match &self.values {
            Values::There(values) => {
                let of_row = self.cols.div_ceil(2 * QUAD);
                let positions = checkpoint.view(&self.unit, self.positions)?;
                let positions = positions.get(start * of_row..end * of_row).unwrap_or_default();
                then(&self.fit(values.rows(checkpoint, rows)?, positions, end - start)?)
            }
            Values::Decoded => {
                let packed = (self.packed)(checkpoint, &self.tensor, start as u64..end as u64)?;
                let Kept::Plain(values) = packed.values() else {
                    return Err(Error::Invalid(format!("unit {}: values are codes", self.unit)));
                };
                let mut aligned = Vec::new();
                then(&self.fit(elements(values, &mut aligned), packed.positions(), end - start)?)
            }
        }
    }

    fn fit<'a>(&self, values: Elements<'a>, positions: &'a [u8], rows: usize) -> Result<Sparse24<'a>> {
        Sparse24::new(values, positions, rows, self.cols).ok_or_else(|| {
            Error::Invalid(format!("unit {}: {rows} rows do not fit its components", self.unit))
        })
    }

    /// All weights of some rows, in single precision.
    pub(super) fn widen(&self, checkpoint: &Checkpoint, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.with(checkpoint, rows, |sparse| sparse.widen(out).map_err(|_| self.no_order(checkpoint)))
    }

    /// The product of some rows with one token.
    pub(super) fn dot_rows(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        self.with(checkpoint, rows, |sparse| {
            dot_sparse24(sparse, x, out).map_err(|_| self.no_order(checkpoint))
        })
    }

    fn no_order(&self, checkpoint: &Checkpoint) -> Error {
        let what = "a quad whose first kept value does not lie before its second";
        Error::corrupt(checkpoint.root(), Some(&self.tensor), format!("{}: {what}", self.positions))
    }
}

/// Values as elements, through `aligned` where their address does not do.
fn elements<'a>(values: &'a abq::Floats<'_>, aligned: &'a mut Vec<u64>) -> Elements<'a> {
    let bytes = values.bytes();
    aligned.resize(bytes.len().div_ceil(8), 0);
    let room = &mut bytemuck::cast_slice_mut::<u64, u8>(aligned)[..bytes.len()];
    room.copy_from_slice(bytes);
    typed(room, values.dtype()).unwrap_or(Elements::F32(&[]))
}

impl Source for Sparse {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let count = rows.len() * self.cols;
        words.resize(count.div_ceil(2), 0);
        let out = &mut bytemuck::cast_slice_mut::<u64, f32>(words)[..count];
        self.widen(checkpoint, rows, out)?;
        Ok(Elements::F32(out))
    }

    fn dot(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
        _words: &mut Vec<u64>,
    ) -> Result<()> {
        self.dot_rows(checkpoint, rows, x, out)
    }

    fn in_place(&self) -> bool {
        !matches!(self.values, Values::Decoded)
    }
}
