//! Codes, scales and zero points of some rows, whatever the layout, and the numbers that they stand for.
//!
//! ```text
//! w = scale * (code - zero), code and zero counted from 0, rounded to the dtype of the scales
//! ```

use std::ops::Range;

use super::awq::{NIBBLE, OUTPUTS};
use super::{CODES, Foreign, GROUP_INDEX, Held, Layout, SCALES, ZEROS, bit_stream};
use crate::encoding::abq::{Floats, write_rounded};
use crate::encoding::{ComponentSet, Part, single};
use crate::{Component, Dtype, Error, Result};

/// Most weights that are decoded at a time, unless a row has more.
const STEP_WEIGHTS: u64 = 1 << 18;
/// Most bytes of an index of groups.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Reads a matrix that another tool quantised, some rows at a time.
#[derive(Debug)]
pub struct Codes {
    foreign: Foreign,
    dtype: Dtype,
    rows: u64,
    cols: usize,
    codes: Component,
    scales: Component,
    zeros: Option<Component>,
    /// The group of each column, where it is not by their order.
    index: Option<Vec<u32>>,
}

impl Codes {
    pub(crate) fn open(set: ComponentSet<'_>, parts: &[Part], foreign: Foreign) -> Result<Self> {
        let part = single(&set, parts)?;
        let [rows, cols] = part.shape[..] else {
            return Err(Error::Invalid(format!("tensor {}: is not a matrix", part.name)));
        };
        let index = match foreign.scattered {
            false => None,
            true => {
                let bytes = set.get(GROUP_INDEX)?.read_all(MAX_INDEX_BYTES)?;
                Some(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
        };
        let zeros = if foreign.zeros { Some(set.get(ZEROS)?) } else { None };
        Ok(Self {
            foreign,
            dtype: part.dtype,
            rows,
            cols: cols as usize,
            codes: set.get(CODES)?,
            scales: set.get(SCALES)?,
            zeros,
            index,
        })
    }

    /// All of it in memory, read once.
    ///
    /// # Errors
    /// What cannot be read; a code or zero point out of its range.
    pub fn held(&self) -> Result<Held> {
        Held::read(self)
    }

    /// What its codes are called, for errors.
    pub(super) fn name(&self) -> &str {
        self.codes.name()
    }

    /// The codes as they are stored.
    pub(super) fn stored(&self) -> &Component {
        &self.codes
    }

    /// The group of each column, where it is not by their order.
    pub(super) fn index(&self) -> Option<&[u32]> {
        self.index.as_deref()
    }

    /// How it was quantised.
    pub fn foreign(&self) -> &Foreign {
        &self.foreign
    }

    /// Output features.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The dtype of the scales, which is that of the matrix.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.foreign.groups(self.cols)
    }

    /// The codes of some rows, counted from 0, into `out` (rows x columns of them).
    ///
    /// # Errors
    /// What cannot be read; a code out of its range.
    pub fn read_codes(&self, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        self.check(&rows, out.len(), self.cols)?;
        let bits = self.foreign.bits;
        match self.foreign.layout {
            Layout::IntQuantized => {
                self.codes.read_at(rows.start * self.cols as u64, out)?;
                self.count_from_zero(&self.codes, out)
            }
            Layout::PackQuantized => {
                let width = bit_stream::words(self.cols as u64, bits).unwrap_or(0);
                let words = read_words(&self.codes, rows.start * width, (rows.end - rows.start) * width)?;
                let each = words.chunks_exact(width.max(1) as usize).zip(out.chunks_exact_mut(self.cols));
                each.for_each(|(words, out)| bit_stream::unpack(words, bits, out));
                Ok(())
            }
            Layout::PackQuantizedWhole => {
                let of_word = (32 / bits) as usize;
                let width = self.cols.div_ceil(of_word) as u64;
                let words = read_words(&self.codes, rows.start * width, (rows.end - rows.start) * width)?;
                let each = words.chunks_exact(width.max(1) as usize).zip(out.chunks_exact_mut(self.cols));
                for (words, out) in each {
                    for (word, out) in words.iter().zip(out.chunks_mut(of_word)) {
                        for (at, out) in out.iter_mut().enumerate() {
                            *out = (word >> (at * usize::from(bits)) & ((1 << bits) - 1)) as u8;
                        }
                    }
                }
                Ok(())
            }
            Layout::Gptq { .. } => {
                let count = rows.end - rows.start;
                let width = bit_stream::words(self.cols as u64, bits).unwrap_or(0);
                // All words of these rows, a word of every row after the other.
                let mut words = vec![0u32; (width * count) as usize];
                for (at, row) in words.chunks_exact_mut(count.max(1) as usize).enumerate() {
                    let first = at as u64 * self.rows + rows.start;
                    self.codes.read_at(first * 4, bytemuck::cast_slice_mut(row))?;
                }
                for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
                    for (column, out) in out.iter_mut().enumerate() {
                        let word = |at: u64| words.get(at as usize * count as usize + row).copied();
                        *out = bit_stream::code(column as u64, bits, word);
                    }
                }
                Ok(())
            }
            Layout::Awq => {
                let cols = self.cols;
                for column in 0..cols {
                    let codes = self.nibbles(&self.codes, column as u64, &rows)?;
                    codes.iter().enumerate().for_each(|(row, code)| out[row * cols + column] = *code);
                }
                Ok(())
            }
        }
    }

    /// The scales of some rows as they are stored, row by row: rows x groups of them.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn read_scales(&self, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let (groups, width) = (self.groups(), self.dtype.bits() as usize / 8);
        self.check(&rows, out.len(), groups * width)?;
        if !self.transposed() {
            return self.scales.read_at(rows.start * (groups * width) as u64, out);
        }
        let mut line = vec![0; (rows.end - rows.start) as usize * width];
        for group in 0..groups {
            self.scales.read_at((group as u64 * self.rows + rows.start) * width as u64, &mut line)?;
            for (scale, out) in line.chunks_exact(width).zip(out.chunks_exact_mut(groups * width)) {
                out[group * width..][..width].copy_from_slice(scale);
            }
        }
        Ok(())
    }

    /// The zero points of some rows, counted as codes are: rows x groups of them; the middle code where none are
    /// stored.
    ///
    /// # Errors
    /// What cannot be read; one out of its range.
    pub fn read_zeros(&self, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let groups = self.groups();
        self.check(&rows, out.len(), groups)?;
        let bits = self.foreign.bits;
        let Some(zeros) = &self.zeros else {
            out.fill(1 << (bits - 1));
            return Ok(());
        };
        match self.foreign.layout {
            Layout::IntQuantized => {
                zeros.read_at(rows.start * groups as u64, out)?;
                self.count_from_zero(zeros, out)
            }
            Layout::PackQuantized => {
                // A stream down each column.
                let first = rows.start * u64::from(bits) / 32;
                let words = rows.end * u64::from(bits);
                let lines = words.div_ceil(32) - first;
                let words = read_words(zeros, first * groups as u64, lines * groups as u64)?;
                for (row, out) in rows.zip(out.chunks_exact_mut(groups)) {
                    for (group, out) in out.iter_mut().enumerate() {
                        let word =
                            |at: u64| words.get((at.checked_sub(first)? as usize) * groups + group).copied();
                        *out = bit_stream::code(row, bits, word);
                    }
                }
                Ok(())
            }
            Layout::PackQuantizedWhole => {
                let of_word = u64::from(32 / bits);
                for (row, out) in rows.zip(out.chunks_exact_mut(groups)) {
                    let words = read_words(zeros, row / of_word * groups as u64, groups as u64)?;
                    for (word, out) in words.iter().zip(out) {
                        *out = (word >> ((row % of_word) as u32 * u32::from(bits)) & ((1 << bits) - 1)) as u8;
                    }
                }
                Ok(())
            }
            Layout::Gptq { plain_zeros } => {
                let width = bit_stream::words(self.rows, bits).unwrap_or(0);
                let mask = ((1u16 << bits) - 1) as u8;
                for group in 0..groups {
                    let first = rows.start * u64::from(bits) / 32;
                    let last = (rows.end * u64::from(bits)).div_ceil(32);
                    let words = read_words(zeros, group as u64 * width + first, last - first)?;
                    for (row, out) in rows.clone().zip(out.chunks_exact_mut(groups)) {
                        let word = |at: u64| words.get(at.checked_sub(first)? as usize).copied();
                        let stored = bit_stream::code(row, bits, word);
                        // The first version stores one less, and 0 so as the highest code.
                        out[group] = if plain_zeros { stored } else { stored.wrapping_add(1) & mask };
                    }
                }
                Ok(())
            }
            Layout::Awq => {
                for group in 0..groups {
                    let line = self.nibbles(zeros, group as u64, &rows)?;
                    line.iter().enumerate().for_each(|(row, zero)| out[row * groups + group] = *zero);
                }
                Ok(())
            }
        }
    }

    /// Decodes elements from `offset` bytes on.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let (width, cols) = (u64::from(self.dtype.bits()) / 8, self.cols as u64);
        let first = offset / width;
        let end = first + out.len() as u64 / width;
        if !offset.is_multiple_of(width)
            || !(out.len() as u64).is_multiple_of(width)
            || end > self.rows * cols
        {
            return Err(Error::Invalid(format!(
                "{}: bytes {offset}..{} do not lie on elements of the matrix",
                self.codes.name(),
                offset.saturating_add(out.len() as u64)
            )));
        }
        let step = (STEP_WEIGHTS / cols.max(1)).max(1);
        let (mut at, mut rest) = (first, out);
        let mut values: Vec<f32> = Vec::new();
        while at < end {
            let rows = at / cols..(at / cols + step).min(end.div_ceil(cols));
            let start = rows.start * cols;
            let take = (end.min(rows.end * cols) - at) as usize;
            self.numbers(rows, &mut values)?;
            let skip = (at - start) as usize;
            let (now, later) = rest.split_at_mut(take * width as usize);
            write_rounded(self.dtype, &values[skip..skip + take], now);
            (at, rest) = (at + take as u64, later);
        }
        Ok(())
    }

    /// What the codes of some rows stand for, in single precision.
    fn numbers(&self, rows: Range<u64>, values: &mut Vec<f32>) -> Result<()> {
        let count = (rows.end - rows.start) as usize;
        let (groups, step) = (self.groups(), self.foreign.group_columns(self.cols));
        let mut codes = vec![0; count * self.cols];
        let mut scales = vec![0; count * groups * self.dtype.bits() as usize / 8];
        let mut zeros = vec![0; count * groups];
        self.read_codes(rows.clone(), &mut codes)?;
        self.read_scales(rows.clone(), &mut scales)?;
        self.read_zeros(rows, &mut zeros)?;
        let scales = Floats::new(self.dtype, scales)?;
        values.clear();
        values.reserve(codes.len());
        for (row, codes) in codes.chunks_exact(self.cols.max(1)).enumerate() {
            values.extend(codes.iter().enumerate().map(|(column, &code)| {
                let group = match &self.index {
                    Some(index) => index.get(column).map_or(0, |group| *group as usize),
                    None => column / step,
                };
                let at = row * groups + group;
                scales.get(at) * (f32::from(code) - f32::from(zeros[at]))
            }));
        }
        Ok(())
    }

    /// Whether outputs lie along the rows of the stored matrices.
    pub(super) fn transposed(&self) -> bool {
        matches!(self.foreign.layout, Layout::Gptq { .. } | Layout::Awq)
    }

    /// One line of AWQ's nibbles, for some rows.
    fn nibbles(&self, component: &Component, line: u64, rows: &Range<u64>) -> Result<Vec<u8>> {
        let width = self.rows / OUTPUTS;
        let (first, last) = (rows.start / OUTPUTS, rows.end.div_ceil(OUTPUTS));
        let words = read_words(component, line * width + first, last - first)?;
        let of_row = |row: u64| {
            let word = words.get((row / OUTPUTS - first) as usize).copied().unwrap_or(0);
            (word >> (4 * NIBBLE[(row % OUTPUTS) as usize]) & 15) as u8
        };
        Ok(rows.clone().map(of_row).collect())
    }

    /// Signed bytes as codes from 0.
    fn count_from_zero(&self, component: &Component, values: &mut [u8]) -> Result<()> {
        let middle = 1i16 << (self.foreign.bits - 1);
        for value in values {
            let code = i16::from(*value as i8) + middle;
            match u8::try_from(code) {
                Ok(code) if i16::from(code) < 2 * middle => *value = code,
                _ => {
                    return Err(component.corrupt(format!(
                        "has a code {} where {} bits hold {} to {}",
                        *value as i8,
                        self.foreign.bits,
                        -middle,
                        middle - 1
                    )));
                }
            }
        }
        Ok(())
    }

    fn check(&self, rows: &Range<u64>, len: usize, of_row: usize) -> Result<()> {
        let expected =
            rows.end.checked_sub(rows.start).and_then(|n| usize::try_from(n).ok()?.checked_mul(of_row));
        if rows.end > self.rows || expected != Some(len) {
            return Err(Error::Invalid(format!(
                "{}: rows {rows:?} of {} do not fit a buffer of {len}",
                self.codes.name(),
                self.rows
            )));
        }
        Ok(())
    }
}

/// Words of a component from a word on.
pub(super) fn read_words(component: &Component, first: u64, count: u64) -> Result<Vec<u32>> {
    let mut words = vec![0; count as usize];
    component.read_at(first * 4, bytemuck::cast_slice_mut(&mut words))?;
    Ok(words)
}
