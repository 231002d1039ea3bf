//! A matrix that another tool quantised, in memory: its codes as bit planes, in order, with scales and zero points.
//!
//! ```text
//! file, whatever the layout --large reads--> planes [bits, N, ceil(K / 32)], scales [N, G], zeros [N, G]
//! ```
//!
//! It takes about as much memory as the file. Rows decode from it without reading again, and where `abq` holds the numbers
//! products run from its codes.

use std::borrow::Cow;
use std::ops::Range;

use super::awq::{NIBBLE, OUTPUTS};
use super::reader::read_words;
use super::{Codes, Foreign, Layout, bit_stream};
use crate::encoding::abq::{Floats, Packed, WORD_COLUMNS, Zero, pack_row, unpack_row, write_rounded};
use crate::{Dtype, Error, Result};

/// Codes that are read at a time where rows lie one after the other, unless a row has more.
const STEP_CODES: usize = 1 << 20;

/// A whole matrix in memory.
#[derive(Debug)]
pub struct Held {
    foreign: Foreign,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    planes: Vec<u32>,
    scales: Floats<'static>,
    zeros: Vec<u8>,
    index: Option<Vec<u32>>,
}

impl Held {
    /// Reads everything.
    pub(super) fn read(codes: &Codes) -> Result<Self> {
        let (foreign, cols, groups) = (*codes.foreign(), codes.cols(), codes.groups());
        let rows = usize::try_from(codes.rows()).ok();
        let words = cols.div_ceil(WORD_COLUMNS);
        let size = |each: usize| {
            rows.and_then(|rows| rows.checked_mul(each)).ok_or_else(|| {
                Error::Limit(format!("{}: is too large for this computer's memory", codes.name()))
            })
        };
        let mut planes = vec![0u32; size(words.saturating_mul(usize::from(foreign.bits)))?];
        if codes.transposed() {
            of_columns(codes, &mut planes)?;
        } else {
            of_rows(codes, &mut planes)?;
        }
        let mut scales = vec![0; size(groups * codes.dtype().bits() as usize / 8)?];
        codes.read_scales(0..codes.rows(), &mut scales)?;
        let mut zeros = vec![0; size(groups)?];
        codes.read_zeros(0..codes.rows(), &mut zeros)?;
        Ok(Self {
            foreign,
            dtype: codes.dtype(),
            rows: rows.unwrap_or(0),
            cols,
            planes,
            scales: Floats::new(codes.dtype(), scales)?,
            zeros,
            index: codes.index().map(<[u32]>::to_vec),
        })
    }

    /// The same numbers as an `abq` matrix.
    ///
    /// # Errors
    /// Why that encoding does not hold them.
    pub fn packed(&self) -> Result<Packed<'_>> {
        let abq = self.foreign.abq()?;
        let scale = Floats::new(self.dtype, self.scales.bytes())?;
        let zero =
            if self.foreign.zeros { Zero::Integer(Cow::Borrowed(&self.zeros)) } else { Zero::Symmetric };
        let packed = Packed::new(abq, self.rows, self.cols, &self.planes[..], scale, zero)?;
        packed.check()?;
        Ok(packed)
    }

    /// Decodes some rows into `out`, in the dtype of the matrix: the bytes of the tensor.
    ///
    /// # Errors
    /// Rows past the end; a buffer of another size.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
        let of_row = self.cols * self.dtype.bits() as usize / 8;
        if rows.end > self.rows || rows.len().checked_mul(of_row) != Some(out.len()) {
            return Err(Error::Invalid(format!(
                "rows {rows:?} of {} do not fit a buffer of {}",
                self.rows,
                out.len()
            )));
        }
        let (groups, step) = (self.foreign.groups(self.cols), self.foreign.group_columns(self.cols));
        let words = self.cols.div_ceil(WORD_COLUMNS);
        let (mut codes, mut values) = (vec![0; self.cols], vec![0.0; self.cols]);
        for (row, out) in rows.zip(out.chunks_exact_mut(of_row.max(1))) {
            unpack_row(&self.planes, self.rows, words, row, &mut codes);
            let value = |code: u8, group: usize| {
                let at = row * groups + group;
                let zero = self.zeros.get(at).copied().unwrap_or(0);
                self.scales.get(at) * (f32::from(code) - f32::from(zero))
            };
            let each = codes.iter().zip(&mut values).enumerate();
            match &self.index {
                Some(index) => {
                    each.zip(index).for_each(|((_, (&code, to)), &group)| *to = value(code, group as usize))
                }
                None => each.for_each(|(column, (&code, to))| *to = value(code, column / step)),
            }
            write_rounded(self.dtype, &values, out);
        }
        Ok(())
    }
}

/// Planes of a layout of rows.
fn of_rows(codes: &Codes, planes: &mut [u32]) -> Result<()> {
    let (rows, cols) = (codes.rows() as usize, codes.cols());
    let words = cols.div_ceil(WORD_COLUMNS);
    let step = (STEP_CODES / cols.max(1)).max(1);
    let mut buffer = Vec::new();
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        buffer.resize(count * cols, 0);
        codes.read_codes(first as u64..(first + count) as u64, &mut buffer)?;
        for (row, codes) in buffer.chunks_exact(cols.max(1)).enumerate() {
            for (plane, of_plane) in planes.chunks_exact_mut((rows * words).max(1)).enumerate() {
                pack_row(codes, plane as u32, &mut of_plane[(first + row) * words..][..words]);
            }
        }
    }
    Ok(())
}

/// Planes of a layout of columns: of 32 columns at a time, whose lines lie one after the other, a word of each plane and row.
fn of_columns(codes: &Codes, planes: &mut [u32]) -> Result<()> {
    let (rows, cols, bits) = (codes.rows() as usize, codes.cols(), codes.foreign().bits);
    let words = cols.div_ceil(WORD_COLUMNS);
    let awq = codes.foreign().layout == Layout::Awq;
    // Words of a line, and lines of 32 columns: of AWQ one a column, of GPTQ as many as a code has bits.
    let width = if awq { rows / OUTPUTS as usize } else { rows };
    let mut of_row = [0; WORD_COLUMNS];
    for block in 0..words {
        let count = WORD_COLUMNS.min(cols - block * WORD_COLUMNS);
        let lines = if awq { count } else { (count * usize::from(bits)).div_ceil(32) };
        let first = block * if awq { WORD_COLUMNS } else { usize::from(bits) };
        let stored = read_words(codes.stored(), (first * width) as u64, (lines * width) as u64)?;
        for row in 0..rows {
            for (column, code) in of_row[..count].iter_mut().enumerate() {
                *code = if awq {
                    let word = stored[column * width + row / OUTPUTS as usize];
                    (word >> (4 * NIBBLE[row % OUTPUTS as usize]) & 15) as u8
                } else {
                    bit_stream::code(column as u64, bits, |at| stored.get(at as usize * width + row).copied())
                };
            }
            for (plane, of_plane) in planes.chunks_exact_mut((rows * words).max(1)).enumerate() {
                let at = row * words + block;
                pack_row(&of_row[..count], plane as u32, &mut of_plane[at..=at]);
            }
        }
    }
    Ok(())
}
