//! Decodes any range of a stored matrix: the scalar reference.
//!
//! ```text
//! rows that fit are read some at a time; of longer ones 2^16 columns, cut between groups where these are shorter
//! ```

use std::ops::Range;

use super::coded::Coded;
use super::floats::{width, write_rounded};
use super::{
    Abq, CODE_LENGTHS, CODES, COMPONENTS, DTYPES, Fault, Floats, OFFSET, PLANES, Packed, SCALE, WORD_COLUMNS,
    ZERO, Zero,
};
use super::{ZeroKind, components, matrix};
use crate::encoding::{ComponentSet, Part, single};
use crate::{Component, Dtype, Error, Result};

/// Most columns that are decoded at a time.
const STEP_COLUMNS: usize = 1 << 16;
/// Most weights, and rows, that are read at a time.
const STEP_WEIGHTS: usize = 1 << 18;
const STEP_ROWS: usize = 1 << 12;

#[derive(Debug)]
pub(in crate::encoding) struct Reader {
    abq: Abq,
    dtype: Dtype,
    rows: u64,
    cols: usize,
    codes: Codes,
    scale: Component,
    zero: Option<(ZeroKind, Component)>,
}

/// Where the codes lie.
#[derive(Debug)]
enum Codes {
    Planes(Component),
    Coded(Coded),
}

impl Codes {
    /// The component that holds them, for errors.
    fn component(&self) -> &Component {
        match self {
            Self::Planes(planes) => planes,
            Self::Coded(coded) => coded.component(),
        }
    }
}

/// What is read at a time: rows from `row`, of which these columns.
struct Piece {
    row: u64,
    rows: usize,
    columns: Range<usize>,
    /// The parameters of the piece by itself: a part of one group has one group.
    abq: Abq,
}

#[derive(Default)]
struct Buffers {
    planes: Vec<u32>,
    scale: Vec<u8>,
    zero: Vec<u8>,
    codes: Vec<u8>,
    values: Vec<f32>,
}

impl Reader {
    pub(in crate::encoding) fn open(set: ComponentSet<'_>, parts: &[Part], abq: Abq) -> Result<Self> {
        let part = single(&set, parts)?;
        let invalid = |what: String| Error::Invalid(format!("unit {}: {what}", set.unit()));
        abq.check().map_err(|e| invalid(e.to_string()))?;
        if let Some(other) = set.names().find(|name| !COMPONENTS.contains(name)) {
            return Err(invalid(format!("has a component {other}, which abq does not know")));
        }
        if !DTYPES.contains(&part.dtype) {
            return Err(invalid(format!(
                "tensor {} is {}, but abq holds F16, BF16 and F32",
                part.name,
                part.dtype.name()
            )));
        }
        let (rows, cols) = matrix(&part.shape).ok_or_else(|| {
            invalid(format!("tensor {}: {:?} is not a matrix that abq holds", part.name, part.shape))
        })?;
        let scale = set.get(SCALE)?;
        let coded = [CODES, CODE_LENGTHS].iter().any(|name| set.find(name).is_some());
        let codes = match (coded, set.find(PLANES).is_some()) {
            (true, true) => return Err(invalid("has both planes and codes, of which one holds".to_owned())),
            (true, false) => Codes::Coded(Coded::open(set, abq, rows, cols as usize)?),
            (false, _) => Codes::Planes(set.get(PLANES)?),
        };
        let zero = match (set.find(OFFSET), set.find(ZERO)) {
            (Some(_), Some(_)) => {
                return Err(invalid("has both offset and zero, of which one holds".to_owned()));
            }
            (Some(offset), None) => Some((ZeroKind::Real(float_dtype(offset, "abq")?), offset.clone())),
            (None, Some(zero)) => Some((ZeroKind::Integer, zero.clone())),
            (None, None) => None,
        };
        let kind = zero.as_ref().map_or(ZeroKind::Symmetric, |(kind, _)| *kind);
        let planes = match &codes {
            Codes::Planes(planes) => Some(planes),
            Codes::Coded(_) => None,
        };
        let others = [&scale].into_iter().chain(zero.as_ref().map(|(_, zero)| zero));
        let stored = std::iter::once(planes).chain(others.map(Some));
        for (component, spec) in stored.zip(components(&abq, rows, cols, float_dtype(&scale, "abq")?, kind)) {
            let Some(component) = component else { continue };
            let bytes = spec.dtype.byte_len(&spec.shape);
            component.require(spec.dtype, bytes.ok_or_else(|| invalid("is too large".to_owned()))?)?;
        }
        Ok(Self { abq, dtype: part.dtype, rows, cols: cols as usize, codes, scale, zero })
    }

    pub(in crate::encoding) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let width = width(self.dtype);
        if !offset.is_multiple_of(width as u64) || !out.len().is_multiple_of(width) {
            return Err(Error::Invalid(format!(
                "{}: bytes from {offset} do not lie on whole elements",
                self.codes.component().name()
            )));
        }
        let first = offset / width as u64;
        let cols = self.cols as u64;
        let end =
            first.checked_add((out.len() / width) as u64).filter(|&end| end <= self.rows * cols).ok_or_else(
                || Error::Invalid(format!("{}: range past the end", self.codes.component().name())),
            )?;
        let mut buffers = Buffers::default();
        let (mut at, mut rest) = (first, out);
        while at < end {
            let piece = self.piece(at / cols, (at % cols) as usize, end.div_ceil(cols));
            self.load(&piece, &mut buffers)?;
            let Buffers { planes, scale, zero, codes, values } = &mut buffers;
            let packed = self.packed(&piece, planes, scale, zero)?;
            codes.resize(piece.columns.len(), 0);
            values.resize(piece.columns.len(), 0.0);
            for row in 0..piece.rows {
                let start = (piece.row + row as u64) * cols + piece.columns.start as u64;
                let (from, to) = (at.max(start), end.min(start + piece.columns.len() as u64));
                if from >= to {
                    break;
                }
                packed.decode_row_with(row, codes, values).map_err(|fault| self.corrupt(&piece, &fault))?;
                let (now, later) = rest.split_at_mut((to - from) as usize * width);
                write_rounded(self.dtype, &values[(from - start) as usize..(to - start) as usize], now);
                (at, rest) = (to, later);
            }
        }
        Ok(())
    }

    /// Some rows as they are stored.
    pub(in crate::encoding) fn packed_rows(&self, rows: Range<u64>) -> Result<Packed<'static>> {
        let count = rows.end.checked_sub(rows.start).filter(|_| rows.end <= self.rows);
        let count = count.and_then(|count| usize::try_from(count).ok());
        let count = count.ok_or_else(|| {
            Error::Invalid(format!(
                "{}: rows {rows:?} of {} were asked for",
                self.codes.component().name(),
                self.rows
            ))
        })?;
        let piece = Piece { row: rows.start, rows: count, columns: 0..self.cols, abq: self.abq };
        let mut buffers = Buffers::default();
        self.load(&piece, &mut buffers)?;
        let packed = self.packed(&piece, &buffers.planes, &buffers.scale, &buffers.zero)?.into_owned();
        packed.check().map_err(|e| self.codes.component().corrupt(e.to_string()))?;
        Ok(packed)
    }

    /// What to read to decode on from a row and a column; rows end before `rows_end`.
    fn piece(&self, row: u64, column: usize, rows_end: u64) -> Piece {
        if self.cols <= STEP_COLUMNS {
            let most = (STEP_WEIGHTS / self.cols).clamp(1, STEP_ROWS) as u64;
            let rows = (rows_end - row).min(most) as usize;
            return Piece { row, rows, columns: 0..self.cols, abq: self.abq };
        }
        let step = self.abq.group_columns(self.cols);
        if step < STEP_COLUMNS {
            let start = column / step * step;
            let end = self.cols.min(start + STEP_COLUMNS / step * step);
            return Piece { row, rows: 1, columns: start..end, abq: self.abq };
        }
        let start = column / WORD_COLUMNS * WORD_COLUMNS;
        let group_end = (column / step + 1).saturating_mul(step);
        let end = self.cols.min(group_end).min(start + STEP_COLUMNS);
        Piece { row, rows: 1, columns: start..end, abq: Abq { group_size: None, ..self.abq } }
    }

    fn load(&self, piece: &Piece, buffers: &mut Buffers) -> Result<()> {
        // The columns of a piece are whole rows, or those of one row.
        let words = self.cols.div_ceil(WORD_COLUMNS) as u64;
        let of_piece = piece.rows * piece.columns.len().div_ceil(WORD_COLUMNS);
        buffers.planes.resize(of_piece * self.abq.planes() as usize, 0);
        match &self.codes {
            Codes::Planes(planes) => {
                for (plane, out) in buffers.planes.chunks_exact_mut(of_piece.max(1)).enumerate() {
                    let row = plane as u64 * self.rows + piece.row;
                    let first = row * words + (piece.columns.start / WORD_COLUMNS) as u64;
                    planes.read_at(first * 4, bytemuck::cast_slice_mut(out))?;
                }
            }
            Codes::Coded(coded) => {
                coded.load(piece.row, piece.columns.clone(), piece.rows, &mut buffers.planes)?;
            }
        }
        let groups = self.abq.groups(self.cols) as u64;
        let first = piece.row * groups + (piece.columns.start / self.abq.group_columns(self.cols)) as u64;
        let count = piece.rows * piece.abq.groups(piece.columns.len());
        let values = |component: &Component, out: &mut Vec<u8>| {
            let width = width(component.dtype());
            out.resize(count * width, 0);
            component.read_at(first * width as u64, out)
        };
        values(&self.scale, &mut buffers.scale)?;
        self.zero.as_ref().map_or(Ok(()), |(_, zero)| values(zero, &mut buffers.zero))
    }

    fn packed<'a>(
        &self,
        piece: &Piece,
        planes: &'a [u32],
        scale: &'a [u8],
        zero: &'a [u8],
    ) -> Result<Packed<'a>> {
        let zero = match &self.zero {
            None => Zero::Symmetric,
            Some((ZeroKind::Real(dtype), _)) => Zero::Real(Floats::new(*dtype, zero)?),
            Some(_) => Zero::Integer(zero.into()),
        };
        let scale = Floats::new(self.scale.dtype(), scale)?;
        Packed::new(piece.abq, piece.rows, piece.columns.len(), planes, scale, zero)
    }

    fn corrupt(&self, piece: &Piece, fault: &Fault) -> Error {
        let component = match (&self.zero, fault.component) {
            (_, PLANES) => self.codes.component(),
            (Some((_, zero)), OFFSET | ZERO) => zero,
            _ => &self.scale,
        };
        let place = match piece.columns.start {
            0 => String::new(),
            start => format!(" (counted from column {start})"),
        };
        component.corrupt(format!("row {}: {}{place}", piece.row + fault.row as u64, fault.what))
    }
}

/// The dtype of numbers that `encoding` has in single precision or less.
pub(in crate::encoding) fn float_dtype(component: &Component, encoding: &str) -> Result<Dtype> {
    match component.dtype() {
        dtype if DTYPES.contains(&dtype) => Ok(dtype),
        other => {
            Err(component.corrupt(format!("is {}; {encoding} has it in F16, BF16 or F32", other.name())))
        }
    }
}
