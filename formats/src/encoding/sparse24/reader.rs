//! Decodes any range of a stored matrix of two in four: the scalar reference.
//!
//! ```text
//! whole rows some at a time, or 2^16 columns of a longer one: positions, kept values --scatter--> quads with +0
//! ```

use std::ops::Range;

use super::positions::{self, places, row_bytes};
use super::{
    Inner, Kept, POSITION_CODES, POSITION_LENGTHS, POSITIONS, Packed, QUAD, Sparse24, VALUES, WITHIN, matrix,
    positions_component,
};
use crate::encoding::abq::{self, Floats};
use crate::encoding::planes::{self, Split};
use crate::encoding::{ComponentSet, Part, fixed12, single, with_words};
use crate::{Component, Dtype, Error, Result};

/// Most columns that are decoded at a time; two quads share a byte of positions.
const STEP_COLUMNS: usize = 1 << 16;
/// Most weights, and rows, that are read at a time.
const STEP_WEIGHTS: usize = 1 << 18;
const STEP_ROWS: usize = 1 << 12;
/// Rows that `fixed12` decodes together: pieces end between them.
const STRIP_ROWS: u64 = 16;

#[derive(Debug)]
pub(in crate::encoding) struct Reader {
    dtype: Dtype,
    rows: u64,
    cols: usize,
    positions: Positions,
    values: Values,
}

/// Where the positions lie.
#[derive(Debug)]
enum Positions {
    Plain(Component),
    Coded(planes::Reader),
}

impl Positions {
    fn open(set: &ComponentSet<'_>, rows: u64, cols: u64) -> Result<Self> {
        let invalid = |what: &str| Error::Invalid(format!("unit {}: {what}", set.unit()));
        let spec = positions_component(rows, cols);
        let bytes = spec.dtype.byte_len(&spec.shape).ok_or_else(|| invalid("is too large"))?;
        let coded = [POSITION_CODES, POSITION_LENGTHS].iter().any(|name| set.find(name).is_some());
        if coded && set.find(POSITIONS).is_some() {
            return Err(invalid("has both positions and position_codes, of which one holds"));
        }
        if coded {
            let split = Split { width: 1, rotate: false };
            let lengths = set.get(POSITION_LENGTHS)?;
            return planes::Reader::new(set.get(POSITION_CODES)?, &lengths, bytes, split).map(Self::Coded);
        }
        let positions = set.get(POSITIONS)?;
        positions.require(spec.dtype, bytes)?;
        Ok(Self::Plain(positions))
    }

    /// The component that holds them, for errors.
    fn component(&self) -> &Component {
        match self {
            Self::Plain(positions) => positions,
            Self::Coded(frames) => frames.data(),
        }
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Plain(positions) => positions.read_at(offset, out),
            Self::Coded(frames) => frames.read(offset, out),
        }
    }
}

/// Where the kept values lie: a matrix of half the columns.
#[derive(Debug)]
enum Values {
    Plain(Component),
    Fixed12(fixed12::Reader),
    Abq(abq::Reader),
}

impl Values {
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Plain(values) => values.read_at(offset, out),
            Self::Fixed12(values) => with_words(offset, out, |first, words| values.read(first, words)),
            Self::Abq(values) => values.read(offset, out),
        }
    }
}

impl Reader {
    pub(in crate::encoding) fn open(set: ComponentSet<'_>, parts: &[Part], sparse: Sparse24) -> Result<Self> {
        let part = single(&set, parts)?;
        let invalid = |what: String| Error::Invalid(format!("unit {}: {what}", set.unit()));
        sparse.check().map_err(|e| invalid(e.to_string()))?;
        if !super::DTYPES.contains(&part.dtype) {
            return Err(invalid(format!(
                "tensor {} is {}, but sparse24 holds F16, BF16 and F32",
                part.name,
                part.dtype.name()
            )));
        }
        let (rows, cols) = matrix(&part.shape).ok_or_else(|| {
            invalid(format!(
                "tensor {}: {:?} is not a matrix that sparse24 holds, whose columns are a multiple of {QUAD}",
                part.name, part.shape
            ))
        })?;
        let known = |name: &str| match &sparse.values {
            _ if [POSITIONS, POSITION_CODES, POSITION_LENGTHS].contains(&name) => true,
            None => name == VALUES,
            Some(inner) => name.strip_prefix(WITHIN).is_some_and(|n| inner.component_names().contains(&n)),
        };
        if let Some(other) = set.names().find(|name| !known(name)) {
            return Err(invalid(format!("has a component {other}, which sparse24 does not know")));
        }
        let positions = Positions::open(&set, rows, cols)?;
        let of_values = Part {
            name: part.name.clone(),
            dtype: part.dtype,
            shape: vec![rows, cols / 2],
            bytes: part.bytes / 2,
        };
        let (inner, parts) = (set.within(WITHIN), std::slice::from_ref(&of_values));
        let values = match sparse.values {
            None => {
                let values = set.get(VALUES)?;
                values.require(part.dtype, part.bytes / 2)?;
                Values::Plain(values)
            }
            Some(Inner::Fixed12 { base }) => Values::Fixed12(fixed12::Reader::open(inner, parts, base)?),
            Some(Inner::Abq(abq)) => Values::Abq(abq::Reader::open(inner, parts, abq)?),
        };
        Ok(Self { dtype: part.dtype, rows, cols: cols as usize, positions, values })
    }

    pub(in crate::encoding) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let width = abq::width(self.dtype);
        if !offset.is_multiple_of(width as u64) || !out.len().is_multiple_of(width) {
            return Err(Error::Invalid(format!(
                "{}: bytes from {offset} do not lie on whole elements",
                self.positions.component().name()
            )));
        }
        let (first, cols) = (offset / width as u64, self.cols as u64);
        let end = first.checked_add((out.len() / width) as u64).filter(|&end| end <= self.rows * cols);
        let end = end.ok_or_else(|| {
            Error::Invalid(format!("{}: range past the end", self.positions.component().name()))
        })?;
        let (mut at, mut rest) = (first, out);
        let (mut positions, mut kept, mut dense) = (Vec::new(), Vec::new(), Vec::new());
        while at < end {
            let (rows, columns) = self.piece(at / cols, (at % cols) as usize, end);
            let row = rows.start;
            self.load(rows.clone(), columns.clone(), &mut positions, &mut kept)?;
            let (of_row, kept_row) = (row_bytes(columns.len()), columns.len() / 2 * width);
            dense.resize(columns.len() * width, 0);
            let pieces = positions.chunks_exact(of_row).zip(kept.chunks_exact(kept_row));
            for (row, (positions, kept)) in (row..).zip(pieces) {
                let start = row * cols + columns.start as u64;
                let (from, to) = (at.max(start), end.min(start + columns.len() as u64));
                if from >= to {
                    break;
                }
                self.check(row, &columns, positions)?;
                scatter(width, positions, kept, &mut dense);
                let (now, later) = rest.split_at_mut((to - from) as usize * width);
                now.copy_from_slice(&dense[(from - start) as usize * width..(to - start) as usize * width]);
                (at, rest) = (to, later);
            }
        }
        Ok(())
    }

    /// Some rows as they are stored; values in `fixed12` come as they are decoded.
    pub(in crate::encoding) fn packed_rows(&self, rows: Range<u64>) -> Result<Packed<'static>> {
        let count = rows.end.checked_sub(rows.start).filter(|_| rows.end <= self.rows);
        let count = count.and_then(|count| usize::try_from(count).ok()).ok_or_else(|| {
            Error::Invalid(format!(
                "{}: rows {rows:?} of {} were asked for",
                self.positions.component().name(),
                self.rows
            ))
        })?;
        let of_row = row_bytes(self.cols);
        let mut positions = vec![0; count * of_row];
        self.positions.read_at(rows.start * of_row as u64, &mut positions)?;
        for (row, positions) in (rows.start..).zip(positions.chunks_exact(of_row)) {
            self.check(row, &(0..self.cols), positions)?;
        }
        let values = match &self.values {
            Values::Abq(values) => Kept::Abq(values.packed_rows(rows)?),
            plain => {
                let of_row = self.cols / 2 * abq::width(self.dtype);
                let mut values = vec![0; count * of_row];
                if count > 0 {
                    plain.read(rows.start * of_row as u64, &mut values)?;
                }
                Kept::Plain(Floats::new(self.dtype, values)?)
            }
        };
        Packed::new(count, self.cols, positions, values)
    }

    /// What to read to decode on from a row and a column up to element `end`: whole rows, or columns of one.
    fn piece(&self, row: u64, column: usize, end: u64) -> (Range<u64>, Range<usize>) {
        if self.cols > STEP_COLUMNS {
            let start = column / STEP_COLUMNS * STEP_COLUMNS;
            return (row..row + 1, start..self.cols.min(start + STEP_COLUMNS));
        }
        let most = (STEP_WEIGHTS / self.cols.max(1)).clamp(1, STEP_ROWS) as u64;
        let aligned = (row + most) / STRIP_ROWS * STRIP_ROWS;
        let stop = if aligned > row { aligned } else { row + most };
        (row..stop.min(end.div_ceil(self.cols.max(1) as u64)), 0..self.cols)
    }

    fn load(
        &self,
        rows: Range<u64>,
        columns: Range<usize>,
        positions: &mut Vec<u8>,
        kept: &mut Vec<u8>,
    ) -> Result<()> {
        let count = (rows.end - rows.start) as usize;
        positions.resize(count * row_bytes(columns.len()), 0);
        let at = rows.start * row_bytes(self.cols) as u64 + (columns.start / (2 * QUAD)) as u64;
        self.positions.read_at(at, positions)?;
        let width = abq::width(self.dtype);
        kept.resize(count * (columns.len() / 2) * width, 0);
        let at = rows.start * (self.cols / 2) as u64 + (columns.start / 2) as u64;
        self.values.read(at * width as u64, kept)
    }

    fn check(&self, row: u64, columns: &Range<usize>, positions: &[u8]) -> Result<()> {
        let Some(what) = positions::fault(positions, columns.len()) else { return Ok(()) };
        let place = match columns.start {
            0 => String::new(),
            start => format!(" (counted from column {start})"),
        };
        Err(self.positions.component().corrupt(format!("row {row}: {what}{place}")))
    }
}

/// Writes kept values to their places among zeros.
fn scatter(width: usize, positions: &[u8], kept: &[u8], out: &mut [u8]) {
    match width {
        2 => scatter_elements::<2>(positions, kept, out),
        _ => scatter_elements::<4>(positions, kept, out),
    }
}

fn scatter_elements<const W: usize>(positions: &[u8], kept: &[u8], out: &mut [u8]) {
    out.fill(0);
    for (quad, (out, kept)) in out.chunks_exact_mut(QUAD * W).zip(kept.chunks_exact(2 * W)).enumerate() {
        let Some((first, second)) = places(positions::get(positions, quad)) else { continue };
        out[first * W..][..W].copy_from_slice(&kept[..W]);
        out[second * W..][..W].copy_from_slice(&kept[W..]);
    }
}
