//! A matrix of two in four in memory: made of a dense one, or seen where it is stored.

use std::borrow::Cow;

use super::positions::{self, places, row_bytes};
use super::{DTYPES, Inner, POSITIONS, QUAD, Sparse24, components, encoded_components};
use crate::encoding::abq::{self, Fault, Floats};
use crate::encoding::{ComponentSpec, Encoding};
use crate::{Dtype, Error, Result};

/// The kept values, `[rows, cols / 2]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept<'a> {
    /// As they are, in the tensor's dtype.
    Plain(Floats<'a>),
    /// As codes: a matrix of half the columns.
    Abq(abq::Packed<'a>),
}

impl Kept<'_> {
    /// The same, not borrowed.
    pub fn into_owned(self) -> Kept<'static> {
        match self {
            Self::Plain(values) => Kept::Plain(values.into_owned()),
            Self::Abq(values) => Kept::Abq(values.into_owned()),
        }
    }
}

/// A matrix of `rows` x `cols` of which every quad has two kept values: a finished unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed<'a> {
    rows: usize,
    cols: usize,
    positions: Cow<'a, [u8]>,
    values: Kept<'a>,
}

impl Packed<'static> {
    /// Takes the values at `positions` out of a dense matrix, to the bit: `dense` are the little-endian bytes of `rows` x
    /// `cols` values, `positions` is `[rows, ceil(cols / 8)]` ([`positions`]). What is not kept is lost.
    ///
    /// # Errors
    /// Another dtype, sizes that do not fit, positions that are not two a quad.
    pub fn pack(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        dense: &[u8],
        positions: impl Into<Cow<'static, [u8]>>,
    ) -> Result<Self> {
        let positions = positions.into();
        let width = check_dense(dtype, rows, cols, dense)?;
        check_positions(rows, cols, &positions)?;
        let mut values = Vec::with_capacity(dense.len() / 2);
        if cols > 0 {
            let rows = dense.chunks_exact(cols * width).zip(positions.chunks_exact(row_bytes(cols)));
            for (row, (dense, at)) in rows.enumerate() {
                positions::gather(width, at, dense, &mut values)
                    .map_err(|quad| Error::Invalid(format!("row {row}: quad {quad} has no places")))?;
            }
        }
        Self::new(rows, cols, positions, Kept::Plain(Floats::new(dtype, values)?))
    }

    /// The same from single precision, each kept value rounded to `dtype` (to the nearest, of two to the even one).
    ///
    /// # Errors
    /// As for [`Self::pack`].
    pub fn round(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        dense: &[f32],
        positions: impl Into<Cow<'static, [u8]>>,
    ) -> Result<Self> {
        if !DTYPES.contains(&dtype) {
            return Err(other_dtype(dtype));
        }
        let mut bytes = vec![0; dense.len() * abq::width(dtype)];
        abq::write_rounded(dtype, dense, &mut bytes);
        Self::pack(dtype, rows, cols, &bytes, positions)
    }

    /// Packs a matrix that is two in four already, without loss: what is not +0 to the bit is kept, and where that are fewer
    /// than two of a quad, its lowest other places fill up.
    ///
    /// # Errors
    /// Another dtype, sizes that do not fit, a quad of more than two values that are not +0.
    pub fn from_dense(dtype: Dtype, rows: usize, cols: usize, dense: &[u8]) -> Result<Self> {
        let width = check_dense(dtype, rows, cols, dense)?;
        let mut positions = vec![0; rows * row_bytes(cols)];
        if cols > 0 {
            let rows = dense.chunks_exact(cols * width).zip(positions.chunks_exact_mut(row_bytes(cols)));
            for (row, (dense, out)) in rows.enumerate() {
                positions::choose_row(width, dense, out).map_err(|quad| {
                    Error::Invalid(format!(
                        "row {row}: more than two of columns {} to {} are not zero",
                        quad * QUAD,
                        quad * QUAD + 3
                    ))
                })?;
            }
        }
        Self::pack(dtype, rows, cols, dense, positions)
    }
}

impl<'a> Packed<'a> {
    /// Takes parts as they are stored: positions `[rows, ceil(cols / 8)]`, values `[rows, cols / 2]`. Looks at their sizes
    /// alone: [`Self::check`] looks at what is in them.
    ///
    /// # Errors
    /// Sizes that do not fit, columns that are no multiple of four.
    pub fn new(
        rows: usize,
        cols: usize,
        positions: impl Into<Cow<'a, [u8]>>,
        values: Kept<'a>,
    ) -> Result<Self> {
        let positions = positions.into();
        let (kept, fits) = match &values {
            Kept::Plain(values) => (values.len(), Some(values.len()) == rows.checked_mul(cols / 2)),
            Kept::Abq(values) => {
                (values.rows() * values.cols(), (values.rows(), values.cols()) == (rows, cols / 2))
            }
        };
        if !fits || !cols.is_multiple_of(QUAD) || Some(positions.len()) != rows.checked_mul(row_bytes(cols)) {
            return Err(Error::Invalid(format!(
                "{} bytes of positions and {kept} values do not make {rows} x {cols} weights of two in four",
                positions.len()
            )));
        }
        let packed = Self { rows, cols, positions, values };
        packed.parameters().check()?;
        Ok(packed)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The positions, `[rows, ceil(cols / 8)]`.
    pub fn positions(&self) -> &[u8] {
        &self.positions
    }

    /// The positions of a row; empty past the last.
    pub fn positions_of(&self, row: usize) -> &[u8] {
        let of_row = row_bytes(self.cols);
        self.positions.get(row * of_row..(row + 1) * of_row).unwrap_or_default()
    }

    /// The kept values, `[rows, cols / 2]`.
    pub fn values(&self) -> &Kept<'a> {
        &self.values
    }

    /// The same positions with other values for the kept ones, such as quantised ones.
    ///
    /// # Errors
    /// Values of another size.
    pub fn with_values(self, values: Kept<'a>) -> Result<Self> {
        Self::new(self.rows, self.cols, self.positions, values)
    }

    /// The parameters.
    pub fn parameters(&self) -> Sparse24 {
        let values = match &self.values {
            Kept::Plain(_) => None,
            Kept::Abq(values) => Some(Inner::Abq(*values.abq())),
        };
        Sparse24 { values }
    }

    /// The encoding of a unit of these [`Self::components`].
    pub fn encoding(&self) -> Encoding {
        Encoding::Sparse24(self.parameters())
    }

    /// Bits of the components over weights, zeros included: the true width.
    pub fn bits_per_weight(&self) -> f64 {
        let bytes: usize = self.components().iter().map(|(_, bytes)| bytes.len()).sum();
        bytes as f64 * 8.0 / (self.rows * self.cols).max(1) as f64
    }

    /// The components as they are stored, in order.
    pub fn components(&self) -> Vec<(ComponentSpec, &[u8])> {
        let (rows, cols) = (self.rows as u64, self.cols as u64);
        let (specs, values) = match &self.values {
            Kept::Plain(values) => (components(rows, cols, values.dtype()), vec![values.bytes()]),
            Kept::Abq(values) => {
                let (specs, bytes): (Vec<_>, Vec<_>) = values.components().into_iter().unzip();
                (encoded_components(rows, cols, specs), bytes)
            }
        };
        specs.into_iter().zip(std::iter::once(&self.positions[..]).chain(values)).collect()
    }

    /// Looks at every position, and at every word of encoded values.
    ///
    /// # Errors
    /// A quad that has not two places, bits past the last quad; what [`abq::Packed::check`] finds.
    pub fn check(&self) -> Result<()> {
        check_positions(self.rows, self.cols, &self.positions)?;
        match &self.values {
            Kept::Plain(_) => Ok(()),
            Kept::Abq(values) => values.check(),
        }
    }

    /// The kept values of a row, in single precision, into `out` (`cols / 2` of them).
    ///
    /// # Errors
    /// Codes or scales that break their format.
    pub fn kept_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        match &self.values {
            Kept::Plain(values) => {
                let first = row * (self.cols / 2);
                out.iter_mut().enumerate().for_each(|(i, out)| *out = values.get(first + i));
                Ok(())
            }
            Kept::Abq(values) => values.decode_row(row, out),
        }
    }

    /// Decodes a row into `out` (`cols` values), in single precision.
    ///
    /// # Errors
    /// As for [`Self::check`], in this row.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let positions = self.positions_of(row);
        if let Some(what) = positions::fault(positions, self.cols) {
            return Err(Fault { component: POSITIONS, row, what }.into());
        }
        let mut kept = vec![0.0; self.cols / 2];
        self.kept_row(row, &mut kept)?;
        out.fill(0.0);
        for (quad, (out, kept)) in out.chunks_exact_mut(QUAD).zip(kept.chunks_exact(2)).enumerate() {
            let (first, second) = places(positions::get(positions, quad)).unwrap_or((0, 1));
            (out[first], out[second]) = (kept[0], kept[1]);
        }
        Ok(())
    }

    /// The same matrix, not borrowed.
    pub fn into_owned(self) -> Packed<'static> {
        Packed {
            rows: self.rows,
            cols: self.cols,
            positions: Cow::Owned(self.positions.into_owned()),
            values: self.values.into_owned(),
        }
    }
}

fn other_dtype(dtype: Dtype) -> Error {
    Error::Invalid(format!("{} weights: sparse24 holds F16, BF16 and F32", dtype.name()))
}

/// Bytes an element of a dense matrix that is one.
fn check_dense(dtype: Dtype, rows: usize, cols: usize, dense: &[u8]) -> Result<usize> {
    if !DTYPES.contains(&dtype) {
        return Err(other_dtype(dtype));
    }
    let width = abq::width(dtype);
    let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(width));
    if bytes != Some(dense.len()) || !cols.is_multiple_of(QUAD) {
        return Err(Error::Invalid(format!(
            "{} bytes are not {rows} x {cols} weights of {}, whose columns are a multiple of {QUAD}",
            dense.len(),
            dtype.name()
        )));
    }
    Ok(width)
}

fn check_positions(rows: usize, cols: usize, positions: &[u8]) -> Result<()> {
    let of_row = row_bytes(cols);
    if Some(positions.len()) != rows.checked_mul(of_row) {
        return Err(Error::Invalid(format!(
            "{} bytes of positions are not those of {rows} rows of {cols} columns",
            positions.len()
        )));
    }
    for (row, positions) in positions.chunks_exact(of_row.max(1)).enumerate() {
        if let Some(what) = positions::fault(positions, cols) {
            return Err(Fault { component: POSITIONS, row, what }.into());
        }
    }
    Ok(())
}
