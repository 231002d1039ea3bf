//! Any part of a tensor of a GGUF file, some rows at a time.

use super::Ggml;
use crate::encoding::abq::write_rounded;
use crate::encoding::{ComponentSet, Part, raw, single};
use crate::{Component, Dtype, Error, Result};

/// Most weights that are decoded at a time, unless a row has more.
const STEP_WEIGHTS: u64 = 1 << 18;
/// Most columns of a matrix: a row is decoded as a whole.
const MOST_COLUMNS: u64 = 1 << 24;

/// Reads a tensor.
#[derive(Debug)]
pub(crate) struct Reader {
    ggml: Ggml,
    dtype: Dtype,
    rows: u64,
    cols: u64,
    data: Component,
}

impl Reader {
    pub(crate) fn open(set: ComponentSet<'_>, parts: &[Part], ggml: Ggml) -> Result<Self> {
        let part = single(&set, parts)?;
        let data = set.get(raw::DATA)?;
        // A bias has a row a value, where rows are interleaved.
        let (rows, cols) = match part.shape[..] {
            [rows] if ggml.heads.is_some() => (rows, 1),
            [ref leading @ .., cols] => (leading.iter().product(), cols),
            [] => (1, 1),
        };
        let bytes = ggml.blocks.bytes(&[rows, cols]);
        let whole = ggml.heads.is_none_or(|heads| heads > 0 && rows.is_multiple_of(2 * heads));
        if bytes != Some(data.bytes()) || !whole || cols > MOST_COLUMNS {
            return Err(
                data.corrupt(format!("has {} bytes, which are no {rows} x {cols} weights", data.bytes()))
            );
        }
        Ok(Self { ggml, dtype: part.dtype, rows, cols, data })
    }

    /// Decodes elements from `offset` bytes on.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let width = u64::from(self.dtype.bits()) / 8;
        let (first, end) = (offset / width, (offset + out.len() as u64) / width);
        let whole = offset.is_multiple_of(width) && (out.len() as u64).is_multiple_of(width);
        if !whole || end > self.rows * self.cols {
            return Err(Error::Invalid(format!(
                "{}: bytes {offset}..{} do not lie on elements",
                self.data.name(),
                offset.saturating_add(out.len() as u64)
            )));
        }
        // Rows that lie apart are read one by one.
        let step = if self.ggml.heads.is_some() { 1 } else { (STEP_WEIGHTS / self.cols).max(1) };
        let of_row = self.cols / self.ggml.blocks.weights() * self.ggml.blocks.block_bytes();
        let (mut at, mut rest) = (first, out);
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        while at < end {
            let row = at / self.cols;
            let rows = row..(row + step).min(end.div_ceil(self.cols));
            let start = rows.start * self.cols;
            let take = (end.min(rows.end * self.cols) - at) as usize;
            let count = rows.end - rows.start;
            bytes.resize((count * of_row) as usize, 0);
            self.data.read_at(self.place(rows.start) * of_row, &mut bytes)?;
            let (now, later) = rest.split_at_mut(take * width as usize);
            let skip = (at - start) as usize;
            if self.ggml.blocks.is_quantised()
                || self.ggml.offset_by_one
                || self.dtype != self.ggml.blocks.decoded()
            {
                values.resize((count * self.cols) as usize, 0.0);
                self.ggml.blocks.decode(&bytes, &mut values);
                if self.ggml.offset_by_one {
                    values.iter_mut().for_each(|value| *value -= 1.0);
                }
                write_rounded(self.dtype, &values[skip..skip + take], now);
            } else {
                // Plain floats are moved, whatever they are.
                now.copy_from_slice(&bytes[skip * width as usize..][..take * width as usize]);
            }
            (at, rest) = (at + take as u64, later);
        }
        Ok(())
    }

    /// Where a row of the tensor lies in the file.
    fn place(&self, row: u64) -> u64 {
        let Some(heads) = self.ggml.heads else { return row };
        let of_head = self.rows / heads;
        let (head, within) = (row / of_head, row % of_head);
        let half = of_head / 2;
        head * of_head + within % half * 2 + within / half
    }
}
