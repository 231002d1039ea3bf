//! Weights that are brought into memory when a model is opened: decoded, or encoded anew.
//!
//! ```text
//! plain       the tensor's own words        read where they lie
//! single      other weights, from a pass    read where they lie
//! fixed12     tiles                         one token is multiplied from the twelve bits, more from decoded rows
//! DFloat11    a unit of its own             decoded some rows at a time
//! ```

use std::ops::Range;

use llmpress_entropy::dfloat11::{self, BLOCK_BYTES, BLOCK_GAP_BYTES, Code, EncodedUnit, Span, decode_span};
use llmpress_entropy::fixed12::{
    Histogram, Strips, StripsRef, TILE_COLS, TILE_ROWS, decode_strips, encode_strips,
};
use llmpress_formats::{Checkpoint, Dtype, Error, Result};
use llmpress_kernels::cpu::{Elements, dot_fixed12};
use rayon::prelude::*;

use super::fixed12::some_strips;
use super::source::{Source, buffer, part, typed};

/// Bytes that a thread decodes at a time.
const PIECE_BYTES: usize = 4 << 20;

/// A matrix's own words, aligned for every dtype.
#[derive(Debug)]
pub(super) struct Plain {
    words: Vec<u64>,
    dtype: Dtype,
    cols: usize,
}

impl Plain {
    /// Reads a whole tensor of `rows` x `cols`, on all threads.
    pub(super) fn read(
        checkpoint: &Checkpoint,
        tensor: &str,
        dtype: Dtype,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let row_bytes = cols * dtype.bits() as usize / 8;
        let mut words = vec![0u64; (rows * row_bytes).div_ceil(8)];
        let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..rows * row_bytes];
        let step = (PIECE_BYTES / row_bytes.max(1)).max(1).next_multiple_of(TILE_ROWS);
        bytes.par_chunks_mut((step * row_bytes).max(1)).enumerate().try_for_each(|(i, part)| {
            let (first, count) = (i * step, part.len() / row_bytes.max(1));
            checkpoint.read_rows(tensor, first as u64..(first + count) as u64, part)
        })?;
        Ok(Self { words, dtype, cols })
    }

    /// The transpose of one of `rows` rows.
    pub(super) fn transposed(&self, rows: usize) -> Self {
        let (cols, width) = (self.cols, self.dtype.bits() as usize / 8);
        let mut words = vec![0u64; self.words.len()];
        let from: &[u8] = bytemuck::cast_slice(&self.words);
        let to = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..rows * cols * width];
        to.par_chunks_mut((rows * width).max(1)).enumerate().for_each(|(col, to)| {
            for (row, to) in to.chunks_exact_mut(width).enumerate() {
                to.copy_from_slice(&from[(row * cols + col) * width..][..width]);
            }
        });
        Self { words, dtype: self.dtype, cols: rows }
    }

    /// The words of a BF16 matrix of `rows` rows.
    pub(super) fn bf16(&self, rows: usize) -> Option<&[u16]> {
        match typed(bytemuck::cast_slice(&self.words), self.dtype)? {
            Elements::Bf16(words) => words.get(..rows * self.cols),
            _ => None,
        }
    }
}

impl Source for Plain {
    fn elements<'a>(
        &'a self,
        _checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        _words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let range = rows.start * self.cols..rows.end * self.cols;
        let all = typed(bytemuck::cast_slice(&self.words), self.dtype);
        Ok(all.map_or(Elements::F32(&[]), |all| part(all, range)))
    }
}

/// A matrix in single precision that was made in memory.
#[derive(Debug)]
pub(super) struct Single {
    weights: Vec<f32>,
    cols: usize,
}

impl Single {
    pub(super) fn new(weights: Vec<f32>, cols: usize) -> Self {
        Self { weights, cols }
    }
}

impl Source for Single {
    fn elements<'a>(
        &'a self,
        _checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        _words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        Ok(Elements::F32(&self.weights[rows.start * self.cols..rows.end * self.cols]))
    }
}

/// A matrix as fixed12.
#[derive(Debug)]
pub(super) struct Fixed12 {
    base: i16,
    rows: usize,
    cols: usize,
    strips: Strips,
    /// Prefix sums of the escapes of each tile.
    offsets: Vec<u32>,
}

impl Fixed12 {
    /// Encodes a matrix; `None` where the encoding does not hold it.
    pub(super) fn encode(words: &[u16], cols: usize) -> Option<Self> {
        let mut histogram = Histogram::new();
        histogram.add(words);
        let window = histogram.best_window();
        u32::try_from(window.escapes).ok()?;
        let mut strips = Strips::default();
        encode_strips(window.base, cols, words, &mut strips).ok()?;
        let sums = strips.escape_counts.iter().scan(0u32, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        let offsets = std::iter::once(0).chain(sums).collect();
        Some(Self { base: window.base, rows: words.len() / cols, cols, strips, offsets })
    }

    /// Strips of 16 rows.
    fn strips(&self, checkpoint: &Checkpoint, strips: Range<usize>) -> Result<StripsRef<'_>> {
        let all = StripsRef {
            sign_mantissa: &self.strips.sign_mantissa,
            codes: &self.strips.codes,
            escape_offsets: &self.offsets,
            escape_positions: &self.strips.escape_positions,
            escape_exponents: &self.strips.escape_exponents,
        };
        let found = some_strips(&all, self.cols.div_ceil(TILE_COLS), strips);
        found.ok_or_else(|| memory_fault(checkpoint, "they end too early"))
    }
}

impl Source for Fixed12 {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let strips = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        let top = strips.start * TILE_ROWS;
        let height = (strips.end * TILE_ROWS).min(self.rows) - top;
        let out = bf16_buffer(words, height * self.cols);
        let strips = self.strips(checkpoint, strips)?;
        decode_strips(self.base, self.cols, height, &strips, out).map_err(|e| memory_fault(checkpoint, e))?;
        Ok(Elements::Bf16(&out[(rows.start - top) * self.cols..(rows.end - top) * self.cols]))
    }

    fn dot(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        x: &[f32],
        out: &mut [f32],
        _words: &mut Vec<u64>,
    ) -> Result<()> {
        let strips = self.strips(checkpoint, rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS))?;
        dot_fixed12(self.base, &strips, x, out).map_err(|e| memory_fault(checkpoint, e))
    }
}

/// A matrix as a DFloat11 unit of its own.
#[derive(Debug)]
pub(super) struct Dfloat11 {
    cols: usize,
    code: Code,
    unit: EncodedUnit,
    /// Number of the first symbol of each block, then of all.
    positions: Vec<u32>,
}

impl Dfloat11 {
    /// Encodes a matrix; `None` where the encoding does not hold it.
    pub(super) fn encode(words: &[u16], cols: usize) -> Option<Self> {
        let unit = dfloat11::encode(words).ok()?;
        let code = Code::from_luts(&unit.luts).ok()?;
        let positions = bytemuck::allocation::pod_collect_to_vec(&unit.output_positions);
        Some(Self { cols, code, unit, positions })
    }
}

impl Source for Dfloat11 {
    fn elements<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
        rows: Range<usize>,
        words: &'a mut Vec<u64>,
    ) -> Result<Elements<'a>> {
        let (first, end) = (rows.start * self.cols, rows.end * self.cols);
        let out = bf16_buffer(words, end - first);
        if first == end {
            return Ok(Elements::Bf16(out));
        }
        let blocks = self.positions.len().saturating_sub(1);
        let from = self.positions.partition_point(|&p| p as usize <= first).saturating_sub(1).min(blocks);
        let to = self.positions.partition_point(|&p| (p as usize) < end).min(blocks);
        let symbols = self.positions[from] as usize..self.positions[to] as usize;
        let stream = &self.unit.encoded_exponent;
        // The last code may run past the last block.
        let last = if to == blocks { stream.len() } else { stream.len().min(to * BLOCK_BYTES + 8) };
        let span = Span {
            encoded_exponent: &stream[from * BLOCK_BYTES..last],
            gaps: &self.unit.gaps[from * BLOCK_GAP_BYTES..to * BLOCK_GAP_BYTES],
            output_positions: bytemuck::cast_slice(&self.positions[from..=to]),
            sign_mantissa: &self.unit.sign_mantissa[symbols.clone()],
        };
        decode_span(&self.code, &span, first - symbols.start, out)
            .map_err(|e| memory_fault(checkpoint, e))?;
        Ok(Elements::Bf16(out))
    }

    fn in_place(&self) -> bool {
        false
    }
}

/// Room for so many words.
fn bf16_buffer(words: &mut Vec<u64>, count: usize) -> &mut [u16] {
    bytemuck::cast_slice_mut(buffer(words, 2 * count))
}

/// What was encoded here and does not decode.
fn memory_fault(checkpoint: &Checkpoint, error: impl std::fmt::Display) -> Error {
    Error::Invalid(format!(
        "{}: weights that were encoded in memory do not decode: {error}: is the memory of this computer sound?",
        checkpoint.root().display()
    ))
}
