//! Any part of a matrix of small floats, some rows at a time.

use std::ops::Range;

use super::elements::{scale_bytes, scales};
use super::{ELEMENTS, Element, GLOBAL, Global, SCALES, Scaled};
use crate::encoding::abq::write_rounded;
use crate::encoding::{Part, UnitReader};
use crate::{Dtype, Error, Result};

/// Most weights that are decoded at a time, unless a row has more.
const STEP_WEIGHTS: u64 = 1 << 18;

/// Reads a matrix, or a stack of them.
#[derive(Debug)]
pub(crate) struct Reader {
    name: String,
    scaled: Scaled,
    dtype: Dtype,
    /// Rows and columns of a stored matrix, and how many matrices there are.
    rows: u64,
    cols: u64,
    count: u64,
    /// What the bytes of elements stand for.
    table: Vec<[f32; 2]>,
    elements: Box<UnitReader>,
    scales: Box<UnitReader>,
    global: Option<Box<UnitReader>>,
}

impl Reader {
    /// Of readers of the components.
    pub(crate) fn open(
        part: &Part,
        scaled: Scaled,
        mut component: impl FnMut(&str) -> Result<UnitReader>,
    ) -> Result<Self> {
        let no_matrix = || Error::Invalid(format!("tensor {}: is no matrix", part.name));
        let (rows, cols, leading) = match (&part.shape[..], scaled.transposed) {
            ([leading @ .., rows, cols], false) | ([leading @ .., cols, rows], true) => {
                (*rows, *cols, leading)
            }
            _ => return Err(no_matrix()),
        };
        let count =
            leading.iter().try_fold(1u64, |all, side| all.checked_mul(*side)).ok_or_else(no_matrix)?;
        Ok(Self {
            name: part.name.clone(),
            scaled,
            dtype: part.dtype,
            rows,
            cols,
            count,
            table: scaled.element.table(),
            elements: Box::new(component(ELEMENTS)?),
            scales: Box::new(component(SCALES)?),
            global: scaled.global.map(|_| component(GLOBAL).map(Box::new)).transpose()?,
        })
    }

    /// Decodes elements from `offset` bytes on.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let width = u64::from(self.dtype.bits()) / 8;
        let (first, len) = (offset / width, out.len() as u64 / width);
        let all = self.count * self.rows * self.cols;
        let on_elements = offset.is_multiple_of(width) && (out.len() as u64).is_multiple_of(width);
        if !on_elements || first.checked_add(len).is_none_or(|end| end > all) {
            return Err(Error::Invalid(format!(
                "tensor {}: bytes {offset}..{} do not lie on elements of the matrix",
                self.name,
                offset.saturating_add(out.len() as u64)
            )));
        }
        if self.scaled.transposed { self.read_columns(first, out) } else { self.read_lines(first, out) }
    }

    /// Rows of the stored matrices, which are columns of the tensor where it is their transpose.
    ///
    /// # Errors
    /// There are not so many; components that cannot be read.
    pub(crate) fn read_stored(&self, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let len = rows.end.saturating_sub(rows.start).saturating_mul(self.cols);
        if rows.end > self.count * self.rows || len * (u64::from(self.dtype.bits()) / 8) != out.len() as u64 {
            return Err(Error::Invalid(format!("tensor {}: there are no stored rows {rows:?}", self.name)));
        }
        self.read_lines(rows.start * self.cols, out)
    }

    /// Elements in the order in which they are stored.
    fn read_lines(&self, first: u64, out: &mut [u8]) -> Result<()> {
        let width = self.dtype.bits() as usize / 8;
        let end = first + (out.len() / width) as u64;
        let step = (STEP_WEIGHTS / self.cols).max(1);
        let (mut at, mut rest) = (first, out);
        let mut strip = Strip::default();
        while at < end {
            let rows = at / self.cols..(at / self.cols + step).min(end.div_ceil(self.cols));
            let start = rows.start * self.cols;
            let take = (end.min(rows.end * self.cols) - at) as usize;
            self.numbers(rows, &mut strip)?;
            let (now, later) = rest.split_at_mut(take * width);
            let skip = (at - start) as usize;
            write_rounded(self.dtype, &strip.values[skip..skip + take], now);
            (at, rest) = (at + take as u64, later);
        }
        Ok(())
    }

    /// Elements of transposed matrices: some lines of each matrix are columns of what is stored.
    fn read_columns(&self, first: u64, out: &mut [u8]) -> Result<()> {
        let width = self.dtype.bits() as usize / 8;
        let of_matrix = self.rows * self.cols;
        let step = (STEP_WEIGHTS / self.cols).max(1);
        let (mut at, mut rest) = (first, out);
        let (mut strip, mut line) = (Strip::default(), Vec::new());
        while !rest.is_empty() {
            let (matrix, within) = (at / of_matrix, at % of_matrix);
            let take = ((of_matrix - within) as usize).min(rest.len() / width);
            let (now, later) = rest.split_at_mut(take * width);
            for first in (0..self.rows).step_by(step as usize) {
                let rows = first..(first + step).min(self.rows);
                self.numbers(matrix * self.rows + rows.start..matrix * self.rows + rows.end, &mut strip)?;
                let (start, end) = (within, within + take as u64);
                for column in start / self.rows..end.div_ceil(self.rows) {
                    // Where these rows lie in the line of this column, as far as they were asked for.
                    let base = column * self.rows;
                    let (from, to) = ((base + rows.start).max(start), (base + rows.end).min(end));
                    if from >= to {
                        continue;
                    }
                    let of_rows = (from - base - rows.start) as usize..(to - base - rows.start) as usize;
                    line.clear();
                    line.extend(of_rows.map(|row| strip.values[row * self.cols as usize + column as usize]));
                    let place = (from - start) as usize * width..(to - start) as usize * width;
                    write_rounded(self.dtype, &line, &mut now[place]);
                }
            }
            (at, rest) = (at + take as u64, later);
        }
        Ok(())
    }

    /// What some stored rows of all matrices stand for.
    fn numbers(&self, rows: Range<u64>, strip: &mut Strip) -> Result<()> {
        let of_row = self.cols / self.scaled.element.in_byte();
        strip.bytes.resize(((rows.end - rows.start) * of_row) as usize, 0);
        self.elements.read(rows.start * of_row, &mut strip.bytes)?;
        let [height, width] = self.scaled.block;
        let (lines, groups) = (self.rows.div_ceil(height), self.cols.div_ceil(width));
        let line_of = |row: u64| row / self.rows * lines + row % self.rows / height;
        let first = line_of(rows.start);
        let count = line_of(rows.end - 1) + 1 - first;
        self.read_scales(
            first * groups..(first + count) * groups,
            &mut strip.scale_bytes,
            &mut strip.scales,
        )?;
        strip.values.clear();
        strip.values.reserve(((rows.end - rows.start) * self.cols) as usize);
        for (row, bytes) in rows.zip(strip.bytes.chunks_exact(of_row.max(1) as usize)) {
            let at = ((line_of(row) - first) * groups) as usize;
            let scales = &strip.scales[at..at + groups as usize];
            self.row(bytes, scales, &mut strip.values);
        }
        Ok(())
    }

    /// The scales of all blocks, of all matrices one after the other, in single precision.
    pub(crate) fn all_scales(&self) -> Result<Vec<f32>> {
        let [height, width] = self.scaled.block;
        let all = self.count * self.rows.div_ceil(height) * self.cols.div_ceil(width);
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        self.read_scales(0..all, &mut bytes, &mut values)?;
        Ok(values)
    }

    /// Some scales, times or by the global one where there is one.
    fn read_scales(&self, range: Range<u64>, bytes: &mut Vec<u8>, values: &mut Vec<f32>) -> Result<()> {
        let of_scale = scale_bytes(self.scaled.scale).unwrap_or(1) as u64;
        bytes.resize(((range.end - range.start) * of_scale) as usize, 0);
        self.scales.read(range.start * of_scale, bytes)?;
        scales(self.scaled.scale, bytes, values);
        if let Some(global) = self.global()? {
            match self.scaled.global {
                Some(Global::Divisor) => values.iter_mut().for_each(|scale| *scale /= global),
                _ => values.iter_mut().for_each(|scale| *scale *= global),
            }
        }
        Ok(())
    }

    /// The scale of the scales. It is data, and opening reads none.
    fn global(&self) -> Result<Option<f32>> {
        let Some(stored) = &self.global else { return Ok(None) };
        let mut bytes = [0; 4];
        stored.read(0, &mut bytes)?;
        let global = f32::from_le_bytes(bytes);
        if !global.is_finite() || global == 0.0 {
            let what =
                format!("tensor {}: its global scale is {global}: get a good copy of the file", self.name);
            return Err(Error::Invalid(what));
        }
        Ok(Some(global))
    }

    /// A row of elements times the scales of its blocks.
    fn row(&self, bytes: &[u8], scales: &[f32], values: &mut Vec<f32>) {
        let width = self.scaled.block[1] as usize;
        let start = values.len();
        match self.scaled.element {
            Element::E2m1 => values.extend(bytes.iter().flat_map(|byte| self.table[usize::from(*byte)])),
            _ => values.extend(bytes.iter().map(|byte| self.table[usize::from(*byte)][0])),
        }
        let blocks = values[start..].chunks_mut(width.max(1));
        blocks.zip(scales).for_each(|(block, scale)| block.iter_mut().for_each(|value| *value *= scale));
    }
}

/// What is needed to decode some rows.
#[derive(Default)]
struct Strip {
    bytes: Vec<u8>,
    scale_bytes: Vec<u8>,
    scales: Vec<f32>,
    values: Vec<f32>,
}
