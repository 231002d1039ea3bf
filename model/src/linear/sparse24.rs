//! sparse24: one token is multiplied from kept values and positions, more from rows in single precision.
//!
//! ```text
//! plain values:   mapped, read where they lie
//! fixed12 values: likewise, decoded tile by tile inside of the product with one token
//! abq values:     codes and positions are joined in memory when the model is opened, in the bits that they have in the file
//! ```

use std::ops::Range;

use llmpress_formats::encoding::abq;
use llmpress_formats::encoding::sparse24::{Inner, Kept, POSITIONS, Packed, QUAD, VALUES};
use llmpress_formats::{Checkpoint, Encoding, Error, Result};
use llmpress_kernels::cpu::{
    Elements, Sparse24, SparseCodes, SparseFault, dot_sparse_codes, dot_sparse_fixed12, dot_sparse24,
};

use super::abq::Components;
use super::fixed12::{self, Names, Tiles};
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
    Plain(Floats),
    Fixed12(Tiles),
    /// With the positions beside them.
    Codes(SparseCodes),
    /// Not aligned, or with coded positions: decoded by the reader of the format whenever they are multiplied.
    Decoded,
}

/// What the components are called in the unit.
pub(super) struct Components24 {
    pub(super) positions: &'static str,
    pub(super) values: &'static str,
    pub(super) fixed12: &'static Names,
}

/// Reads some rows of a tensor as they are stored.
pub(super) type Rows = fn(&Checkpoint, &str, Range<u64>) -> Result<Packed<'static>>;

/// Opens a sparse24 matrix.
pub(super) fn open(stored: &Stored<'_>) -> Result<Option<Box<dyn Source>>> {
    let Encoding::Sparse24(sparse) = *stored.encoding()? else { return Ok(None) };
    let read: Rows = |checkpoint, tensor, rows| checkpoint.sparse_rows(tensor, rows);
    let names = Components24 { positions: POSITIONS, values: VALUES, fixed12: &fixed12::VALUES };
    let sparse = Sparse::open(stored, sparse.values, &names, read)?;
    Ok(sparse.map(|sparse| Box::new(sparse) as Box<dyn Source>))
}

impl Sparse {
    /// Finds the components, by their names in the unit. `None` where values are not aligned.
    pub(super) fn open(
        stored: &Stored<'_>,
        values: Option<Inner>,
        names: &Components24,
        packed: Rows,
    ) -> Result<Option<Self>> {
        let (checkpoint, unit) = (stored.checkpoint, &stored.info.unit);
        // Also checks the sizes of all components, so that a faulty unit is found now.
        checkpoint.read(stored.tensor, 0, &mut [])?;
        // Those that went through an entropy coder are decoded with their values.
        let components = checkpoint.units().get(unit).map(llmpress_formats::Unit::components);
        let plain_positions = components.is_some_and(|all| all.contains_key(names.positions));
        let values = match values {
            None | Some(Inner::Fixed12 { .. }) if !plain_positions => Some(Values::Decoded),
            None => Floats::mapped(checkpoint, unit, names.values, stored.dtype, stored.cols / 2)?
                .map(Values::Plain),
            Some(Inner::Fixed12 { base }) => Some(
                Tiles::open(stored, names.fixed12, base, stored.cols / 2)
                    .map_or(Values::Decoded, Values::Fixed12),
            ),
            Some(Inner::Abq(_)) => {
                let all = packed(checkpoint, stored.tensor, 0..stored.rows as u64)?;
                match all.values() {
                    Kept::Abq(codes) => {
                        let codes = Components::of(codes.clone());
                        let joined = SparseCodes::new(&codes.stored(), all.positions(), stored.cols);
                        Some(Values::Codes(joined.map_err(|e| {
                            Error::corrupt(checkpoint.root(), Some(stored.tensor), e.to_string())
                        })?))
                    }
                    Kept::Plain(_) => None,
                }
            }
        };
        Ok(values.map(|values| Self {
            tensor: stored.tensor.to_owned(),
            unit: unit.clone(),
            cols: stored.cols,
            positions: names.positions,
            packed,
            values,
        }))
    }

    /// Positions of some rows.
    fn positions<'a>(&self, checkpoint: &'a Checkpoint, rows: Range<usize>) -> Result<&'a [u8]> {
        let of_row = self.cols.div_ceil(2 * QUAD);
        let positions = checkpoint.view(&self.unit, self.positions)?;
        Ok(positions.get(rows.start * of_row..rows.end * of_row).unwrap_or_default())
    }

    /// Does something with some rows as plain values.
    fn with<T>(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        then: impl FnOnce(&Sparse24<'_>) -> Result<T>,
    ) -> Result<T> {
        let count = rows.len();
        match &self.values {
            Values::Plain(values) => {
                let positions = self.positions(checkpoint, rows.clone())?;
                then(&self.fit(values.rows(checkpoint, rows)?, positions, count)?)
            }
            Values::Fixed12(tiles) => {
                let (positions, mut words) = (self.positions(checkpoint, rows.clone())?, Vec::new());
                let words = tiles.decode(checkpoint, rows, &mut words)?;
                then(&self.fit(Elements::Bf16(words), positions, count)?)
            }
            Values::Codes(_) | Values::Decoded => {
                let packed = (self.packed)(checkpoint, &self.tensor, rows.start as u64..rows.end as u64)?;
                let Kept::Plain(values) = packed.values() else {
                    return Err(Error::Invalid(format!("unit {}: values are codes", self.unit)));
                };
                let mut aligned = Vec::new();
                then(&self.fit(elements(values, &mut aligned), packed.positions(), count)?)
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
        if let Values::Codes(codes) = &self.values {
            codes.widen(rows, out);
            return Ok(());
        }
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
        match &self.values {
            Values::Codes(codes) => {
                dot_sparse_codes(codes, rows, x, out);
                Ok(())
            }
            Values::Fixed12(tiles) => {
                let positions = self.positions(checkpoint, rows.clone())?;
                let strips = tiles.strips(checkpoint, rows)?;
                dot_sparse_fixed12(tiles.base(), &strips, positions, x, out).map_err(|e| match e {
                    SparseFault::Positions => self.no_order(checkpoint),
                    other => tiles.fault(checkpoint, other),
                })
            }
            Values::Plain(_) | Values::Decoded => self.with(checkpoint, rows, |sparse| {
                dot_sparse24(sparse, x, out).map_err(|_| self.no_order(checkpoint))
            }),
        }
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
