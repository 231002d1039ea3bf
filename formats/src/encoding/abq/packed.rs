//! A quantised matrix in memory: made by a quantiser, or seen where it is stored.

use std::borrow::Cow;

use super::{
    Abq, Fault, Floats, OFFSET, PLANES, SCALE, WORD_COLUMNS, ZeroKind, components, pack, unpack_row,
};
use crate::encoding::ComponentSpec;
use crate::{Error, Result};

/// Where zero lies on the grid of each group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Zero<'a> {
    /// At the middle code.
    Symmetric,
    /// At a code, [N, G]: w = scale * (code - zero).
    Integer(Cow<'a, [u8]>),
    /// Anywhere, [N, G]: w = scale * code + offset.
    Real(Floats<'a>),
}

impl Zero<'_> {
    /// How they are stored.
    pub fn kind(&self) -> ZeroKind {
        match self {
            Self::Symmetric => ZeroKind::Symmetric,
            Self::Integer(_) => ZeroKind::Integer,
            Self::Real(offsets) => ZeroKind::Real(offsets.dtype()),
        }
    }

    /// The same, not borrowed.
    pub fn into_owned(self) -> Zero<'static> {
        match self {
            Self::Symmetric => Zero::Symmetric,
            Self::Integer(zeros) => Zero::Integer(Cow::Owned(zeros.into_owned())),
            Self::Real(offsets) => Zero::Real(offsets.into_owned()),
        }
    }
}

/// A matrix of `rows` x `cols` codes with their grids: a finished unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed<'a> {
    abq: Abq,
    rows: usize,
    cols: usize,
    planes: Cow<'a, [u32]>,
    scale: Floats<'a>,
    zero: Zero<'a>,
}

impl Packed<'static> {
    /// Packs rows of `cols` codes. Scales, and zeros or offsets, are `[rows, groups]`.
    ///
    /// # Errors
    /// Parameters, sizes, codes, scales or offsets that the encoding does not have.
    pub fn from_codes(
        abq: Abq,
        cols: usize,
        codes: &[u8],
        scale: Floats<'static>,
        zero: Zero<'static>,
    ) -> Result<Self> {
        abq.check()?;
        if cols == 0 || !codes.len().is_multiple_of(cols) {
            return Err(Error::Invalid(format!("{} codes are no rows of {cols} columns", codes.len())));
        }
        if let Some(code) = codes.iter().find(|&&code| u32::from(code) >= abq.levels()) {
            return Err(Error::Invalid(format!("code {code} of {} levels", abq.levels())));
        }
        let planes = pack(codes, cols, abq.planes());
        let packed = Self::new(abq, codes.len() / cols, cols, planes, scale, zero)?;
        packed.check()?;
        Ok(packed)
    }
}

impl<'a> Packed<'a> {
    /// Takes components as they are stored: planes `[P, rows, ceil(cols / 32)]`; scales, and zeros or offsets,
    /// `[rows, groups]`. Looks at their sizes alone: [`Self::check`] looks at what is in them.
    ///
    /// # Errors
    /// Parameters or sizes that do not fit.
    pub fn new(
        abq: Abq,
        rows: usize,
        cols: usize,
        planes: impl Into<Cow<'a, [u32]>>,
        scale: Floats<'a>,
        zero: Zero<'a>,
    ) -> Result<Self> {
        abq.check()?;
        let planes = planes.into();
        let groups = rows.checked_mul(abq.groups(cols));
        let words = rows.checked_mul(cols.div_ceil(WORD_COLUMNS) * abq.planes() as usize);
        let zeros = match &zero {
            Zero::Symmetric => groups,
            Zero::Integer(zeros) => Some(zeros.len()),
            Zero::Real(offsets) => Some(offsets.len()),
        };
        if words != Some(planes.len()) || groups != Some(scale.len()) || zeros != groups {
            return Err(Error::Invalid(format!(
                "{} words of planes, {} scales and {zeros:?} zero points do not make {rows} x {cols} codes of {}",
                planes.len(),
                scale.len(),
                abq.widths()
            )));
        }
        Ok(Self { abq, rows, cols, planes, scale, zero })
    }

    /// The parameters.
    pub fn abq(&self) -> &Abq {
        &self.abq
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.abq.groups(self.cols)
    }

    /// The planes, `[P, rows, ceil(cols / 32)]`.
    pub fn planes(&self) -> &[u32] {
        &self.planes
    }

    /// The scales, `[rows, groups]`.
    pub fn scale(&self) -> &Floats<'a> {
        &self.scale
    }

    /// The zero points.
    pub fn zero(&self) -> &Zero<'a> {
        &self.zero
    }

    /// Bits of the components over weights: the true width.
    pub fn bits_per_weight(&self) -> f64 {
        let bytes: usize = self.components().iter().map(|(_, bytes)| bytes.len()).sum();
        bytes as f64 * 8.0 / (self.rows * self.cols).max(1) as f64
    }

    /// The components as they are stored, in order.
    pub fn components(&self) -> Vec<(ComponentSpec, &[u8])> {
        let zero = match &self.zero {
            Zero::Symmetric => None,
            Zero::Integer(zeros) => Some(&zeros[..]),
            Zero::Real(offsets) => Some(offsets.bytes()),
        };
        let bytes = [bytemuck::cast_slice(&self.planes), self.scale.bytes()].into_iter().chain(zero);
        let specs =
            components(&self.abq, self.rows as u64, self.cols as u64, self.scale.dtype(), self.zero.kind());
        specs.into_iter().zip(bytes).collect()
    }

    /// The codes of a row into `out` (`cols` of them).
    pub fn codes(&self, row: usize, out: &mut [u8]) {
        let cols = self.cols.min(out.len());
        unpack_row(&self.planes, self.rows, self.words(), row, &mut out[..cols]);
    }

    /// Looks at every word of every component.
    ///
    /// # Errors
    /// A scale or an offset that is not finite, a code past the levels, a bit past the last column: by row.
    pub fn check(&self) -> Result<()> {
        let groups = self.groups();
        let finite = |name: &'static str, floats: &Floats<'_>| match floats.first_not_finite() {
            None => Ok(()),
            Some(at) => Err(not_finite(name, at / groups, at % groups, floats.get(at))),
        };
        finite(SCALE, &self.scale)?;
        if let Zero::Real(offsets) = &self.zero {
            finite(OFFSET, offsets)?;
        }
        (0..self.rows).try_for_each(|row| self.check_codes(row))?;
        Ok(())
    }

    /// Decodes a row into `out` (`cols` values): each operation is rounded to single precision.
    ///
    /// # Errors
    /// As for [`Self::check`], in this row.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let mut codes = vec![0; self.cols];
        Ok(self.decode_row_with(row, &mut codes, out)?)
    }

    /// The same with room for `cols` codes.
    pub(super) fn decode_row_with(&self, row: usize, codes: &mut [u8], out: &mut [f32]) -> Result<(), Fault> {
        self.check_codes(row)?;
        self.codes(row, codes);
        let step = self.abq.group_columns(self.cols);
        let groups = self.groups();
        for (group, (codes, out)) in codes.chunks(step).zip(out.chunks_mut(step)).enumerate() {
            let at = row * groups + group;
            let scale = self.scale.get(at);
            if !scale.is_finite() {
                return Err(not_finite(SCALE, row, group, scale));
            }
            match &self.zero {
                Zero::Real(offsets) => {
                    let offset = offsets.get(at);
                    if !offset.is_finite() {
                        return Err(not_finite(OFFSET, row, group, offset));
                    }
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = scale * f32::from(code) + offset;
                    }
                }
                Zero::Integer(zeros) => {
                    centred(scale, zeros.get(at).copied().unwrap_or(0), codes, out);
                }
                Zero::Symmetric => centred(scale, self.abq.centre(), codes, out),
            }
        }
        Ok(())
    }

    /// The same matrix, not borrowed.
    pub fn into_owned(self) -> Packed<'static> {
        Packed {
            abq: self.abq,
            rows: self.rows,
            cols: self.cols,
            planes: Cow::Owned(self.planes.into_owned()),
            scale: self.scale.into_owned(),
            zero: self.zero.into_owned(),
        }
    }

    /// Words of a row of a plane.
    fn words(&self) -> usize {
        self.cols.div_ceil(WORD_COLUMNS)
    }

    /// Refuses bits past the last column, and codes past the levels of a balanced grid: with the highest plane set no
    /// other may be.
    fn check_codes(&self, row: usize) -> Result<(), Fault> {
        let words = self.words();
        let stride = self.rows * words;
        let of_row = |plane: usize| {
            self.planes
                .get(plane * stride + row * words..plane * stride + (row + 1) * words)
                .unwrap_or_default()
        };
        let planes = self.abq.planes() as usize;
        let fault = |what: String| Err(Fault { component: PLANES, row, what });
        let tail = self.cols % WORD_COLUMNS;
        if tail != 0 && (0..planes).any(|plane| of_row(plane).last().is_some_and(|word| word >> tail != 0)) {
            return fault(format!("bits are set past its {} columns", self.cols));
        }
        if self.abq.balanced {
            for (at, &top) in of_row(planes - 1).iter().enumerate() {
                let others = (0..planes - 1).fold(0, |bits, plane| bits | of_row(plane)[at]);
                if top & others != 0 {
                    let column = at * WORD_COLUMNS + (top & others).trailing_zeros() as usize;
                    return fault(format!(
                        "column {column}: its code is past the {} levels",
                        self.abq.levels()
                    ));
                }
            }
        }
        Ok(())
    }
}

fn centred(scale: f32, zero: u8, codes: &[u8], out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = scale * f32::from(i16::from(code) - i16::from(zero));
    }
}

fn not_finite(component: &'static str, row: usize, group: usize, value: f32) -> Fault {
    Fault { component, row, what: format!("group {group}: {value} is not finite") }
}
