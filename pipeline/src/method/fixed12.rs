//! `fixed12`: twelve bits a weight; BF16 matrices.

mod sinks;
mod timed;

use std::collections::BTreeMap;

use llmpress_entropy::fixed12::{self, Grid, TILE_COLS, TILE_ROWS};
use llmpress_formats::encoding::Encoding;
use llmpress_formats::encoding::fixed12 as names;
use llmpress_formats::{Dtype, Tensor};

use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey, share, would_not_shrink};
pub(super) use sinks::StripSinks;

use super::timed::Timed;
use crate::sink::{Encoded, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, batches_of, histograms, pieces};
use crate::{Error, Result};

/// The widest strip that is encoded as a whole where memory allows.
const MAX_WHOLE_STRIP: u64 = 8 << 20;

pub(crate) struct Fixed12;

impl Room for Fixed12 {
    fn name(&self) -> &'static str {
        "fixed12"
    }

    fn bf16_only(&self) -> bool {
        true
    }

    fn fit(&self, tensor: &Tensor) -> Fit {
        if tensor.dtype != Dtype::BF16 {
            return Fit::Planes;
        }
        match names::grid(&tensor.shape) {
            Some(grid) if without_escapes(&grid) < tensor.bytes => Fit::Suits,
            _ => Fit::Raw,
        }
    }

    fn expected_bytes(&self, tensor: Option<&Tensor>, bytes: u64) -> u64 {
        let grid = tensor.and_then(|tensor| names::grid(&tensor.shape));
        grid.map_or(share(bytes, 76), |grid| without_escapes(&grid))
    }

    fn components(&self) -> &'static [&'static str] {
        &names::COMPONENTS
    }

    fn handy_bytes(&self, tensor: &Tensor) -> u64 {
        let strip = tensor.shape.last().map_or(0, |cols| cols.saturating_mul(2 * TILE_ROWS as u64));
        // Wider ones are encoded in parts.
        if strip > MAX_WHOLE_STRIP { 0 } else { strip }
    }

    fn on_gpu(&self) -> Encoding {
        Encoding::Fixed12 { base: 0 }
    }

    fn reads(&self) -> u64 {
        3
    }

    fn timed(&self, dtype: Dtype) -> Option<Box<dyn Timed>> {
        (dtype == Dtype::BF16).then(|| Box::<timed::Matrices>::default() as Box<dyn Timed>)
    }

    fn gb_per_second(&self) -> f64 {
        0.31
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let Some(grid) = names::grid(&first.shape) else {
            return Ok(Err("is not a matrix".to_owned()));
        };
        let histograms = histograms(unit, work, |words| {
            let mut histogram = fixed12::Histogram::new();
            histogram.add(words);
            histogram
        })?;
        let mut total = fixed12::Histogram::new();
        for histogram in &histograms {
            total.merge(histogram);
        }
        let window = total.best_window();
        if window.escapes > u64::from(u32::MAX) {
            return Ok(Err(format!("{} weights lie outside the exponent window", window.escapes)));
        }
        let spec = names::components(&grid, window.escapes);
        if let Some(reason) = would_not_shrink(&spec, unit.bytes()) {
            return Ok(Err(format!("{reason}: {} weights lie outside the exponent window", window.escapes)));
        }
        Ok(Ok(Coding {
            encoding: Encoding::Fixed12 { base: window.base },
            spec,
            step: if strip_bytes(&grid) > work.piece_bytes { 2 } else { strip_bytes(&grid) },
            encoder: Encoder::Sized(Box::new(Strips { grid, base: window.base })),
            fallback: None,
        }))
    }
}

fn without_escapes(grid: &Grid) -> u64 {
    grid.sign_mantissa_bytes() + grid.codes_bytes() + grid.escape_offsets_bytes()
}

fn strip_bytes(grid: &Grid) -> usize {
    grid.cols() as usize * TILE_ROWS * 2
}

struct Strips {
    grid: Grid,
    base: i16,
}

/// Rows and columns of a matrix that are encoded at a time: strips, or whole tiles of one.
struct Block {
    first_row: u64,
    rows: u64,
    first_col: u64,
    cols: u64,
}

impl Block {
    /// Its words, row by row, out of a matrix of so many columns.
    fn read(&self, unit: &UnitSource<'_>, matrix_cols: u64, words: &mut Vec<u16>) -> Result<()> {
        words.resize((self.rows * self.cols) as usize, 0);
        let at = |row: u64| 2 * ((self.first_row + row) * matrix_cols + self.first_col);
        if self.cols == matrix_cols {
            return unit.read(at(0), bytemuck::cast_slice_mut(words));
        }
        for (row, words) in (0..).zip(words.chunks_mut((self.cols as usize).max(1))) {
            unit.read(at(row), bytemuck::cast_slice_mut(words))?;
        }
        Ok(())
    }
}

impl Strips {
    /// Cuts the matrix into blocks of at most `piece_bytes`, in the order of its tiles.
    fn blocks(&self, piece_bytes: usize) -> Vec<Block> {
        let (rows, cols) = (self.grid.rows(), self.grid.cols());
        let (strip, column) = (strip_bytes(&self.grid), 2 * TILE_ROWS * TILE_COLS);
        let high = ((piece_bytes / strip.max(1)).max(1) * TILE_ROWS) as u64;
        let wide =
            if strip <= piece_bytes { cols } else { ((piece_bytes / column).max(1) * TILE_COLS) as u64 };
        let starts = |end: u64, step: u64| (0..end.div_ceil(step.max(1))).map(move |i| i * step);
        let mut blocks = Vec::new();
        for first_row in starts(rows, high) {
            blocks.extend(starts(cols, wide).map(|first_col| Block {
                first_row,
                rows: high.min(rows - first_row),
                first_col,
                cols: wide.min(cols - first_col),
            }));
        }
        blocks
    }
}

impl SizedEncoder for Strips {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut sinks = StripSinks::take(&mut slots, |name| name, work)?;
        let mut digests = SourceDigests::new(unit, work.threads);
        let whole_rows = strip_bytes(&self.grid) <= work.piece_bytes;
        batches_of::<Block, fixed12::Strips>(
            &self.blocks(work.piece_bytes),
            work,
            |_, block, words, strips| {
                block.read(unit, self.grid.cols(), words)?;
                fixed12::encode_strips(self.base, block.cols as usize, words, strips)
                    .map_err(|e| Error::Invalid(e.to_string()))
            },
            |batch| {
                let (written, ()) = work.threads.join(
                    || sinks.append(batch.iter().map(|(_, strips)| strips)),
                    || {
                        let rows = batch.iter().filter(|_| whole_rows);
                        rows.for_each(|(words, _)| digests.update(bytemuck::cast_slice(words)));
                    },
                );
                written
            },
        )?;
        if !whole_rows {
            // Parts of rows come in another order than the tensor's bytes.
            let mut bytes = Vec::new();
            for (offset, len) in pieces(unit.bytes(), work.piece_bytes & !1) {
                bytes.resize(len, 0);
                unit.read(offset, &mut bytes)?;
                digests.update(&bytes);
            }
        }
        let mut components = BTreeMap::new();
        sinks.finish(&mut components)?;
        Ok(Encoded { tensors: digests.finish(), components })
    }
}
