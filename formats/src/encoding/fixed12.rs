//! `fixed12`: eight bits of sign and mantissa and a four-bit exponent code a weight.
//!
//! ```text
//! <tensor>.sign_mantissa      U8  [tiles, 1024]   tiles of 16 rows x 64 columns, lane order
//! <tensor>.codes              U8  [tiles, 512]
//! <tensor>.escape_offsets     U32 [tiles + 1]     prefix sums of the escapes of each tile
//! <tensor>.escape_positions   U16 [E]             row * 64 + column within the tile
//! <tensor>.escape_exponents   U8  [E]
//! ```

use std::ops::Range;

use llmpress_entropy::fixed12::{
    Grid, StripsRef, TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS, decode_strips,
};

use super::{ComponentSet, ComponentSpec, Part, require_bf16, single};
use crate::{Component, Dtype, Error, Result};

/// Plane A.
pub const SIGN_MANTISSA: &str = "sign_mantissa";
/// Plane B.
pub const CODES: &str = "codes";
/// Prefix sums of the escapes of each tile.
pub const ESCAPE_OFFSETS: &str = "escape_offsets";
/// Where in its tile each escape lies.
pub const ESCAPE_POSITIONS: &str = "escape_positions";
/// The exponent of each escape.
pub const ESCAPE_EXPONENTS: &str = "escape_exponents";

/// All of them.
pub const COMPONENTS: [&str; 5] = [SIGN_MANTISSA, CODES, ESCAPE_OFFSETS, ESCAPE_POSITIONS, ESCAPE_EXPONENTS];

/// Weights decoded at a time when a reader must go through a scratch buffer.
const SCRATCH_WEIGHTS: usize = 1 << 20;

/// The matrix that a tensor is stored as: all leading dimensions are rows. `None` for tensors that
/// are no matrix (fewer than two dimensions, or an empty one) or too large.
pub fn grid(shape: &[u64]) -> Option<Grid> {
    let (&cols, leading) = shape.split_last()?;
    let rows = leading.iter().try_fold(1u64, |a, &b| a.checked_mul(b))?;
    if leading.is_empty() || rows == 0 || cols == 0 || usize::try_from(cols.checked_mul(16)?).is_err() {
        return None;
    }
    let grid = Grid::new(rows, cols)?;
    grid.tiles().checked_mul(TILE_WEIGHTS as u64 * 2).map(|_| grid)
}

/// The components of a matrix with `escapes` escapes.
pub fn components(grid: &Grid, escapes: u64) -> Vec<ComponentSpec> {
    let tiles = grid.tiles();
    vec![
        ComponentSpec { name: SIGN_MANTISSA, dtype: Dtype::U8, shape: vec![tiles, TILE_WEIGHTS as u64] },
        ComponentSpec { name: CODES, dtype: Dtype::U8, shape: vec![tiles, TILE_CODE_BYTES as u64] },
        ComponentSpec { name: ESCAPE_OFFSETS, dtype: Dtype::U32, shape: vec![tiles + 1] },
        ComponentSpec { name: ESCAPE_POSITIONS, dtype: Dtype::U16, shape: vec![escapes] },
        ComponentSpec { name: ESCAPE_EXPONENTS, dtype: Dtype::U8, shape: vec![escapes] },
    ]
}

#[derive(Debug)]
pub(super) struct Reader {
    grid: Grid,
    base: i16,
    sign_mantissa: Component,
    codes: Component,
    offsets: Component,
    positions: Component,
    exponents: Component,
}

impl Reader {
    pub(super) fn open(set: ComponentSet<'_>, parts: &[Part], base: i16) -> Result<Self> {
        let part = single(&set, parts)?;
        require_bf16(&set, parts)?;
        let grid = grid(&part.shape).ok_or_else(|| {
            Error::Invalid(format!(
                "tensor {}: {:?} is not a matrix that fixed12 holds",
                part.name, part.shape
            ))
        })?;
        let reader = Self {
            base,
            sign_mantissa: set.get(SIGN_MANTISSA)?,
            codes: set.get(CODES)?,
            offsets: set.get(ESCAPE_OFFSETS)?,
            positions: set.get(ESCAPE_POSITIONS)?,
            exponents: set.get(ESCAPE_EXPONENTS)?,
            grid,
        };
        let grid = &reader.grid;
        reader.sign_mantissa.require(Dtype::U8, grid.sign_mantissa_bytes())?;
        reader.codes.require(Dtype::U8, grid.codes_bytes())?;
        reader.offsets.require(Dtype::U32, grid.escape_offsets_bytes())?;
        let escapes = reader.exponents.bytes();
        reader.exponents.require(Dtype::U8, escapes)?;
        reader.positions.require(Dtype::U16, escapes.saturating_mul(2))?;
        let mut end = [0u32; 2];
        reader.offsets.read_at(0, bytemuck::bytes_of_mut(&mut end[0]))?;
        reader.offsets.read_at(grid.tiles() * 4, bytemuck::bytes_of_mut(&mut end[1]))?;
        if end[0] != 0 || u64::from(end[1]) != escapes {
            return Err(reader
                .offsets
                .corrupt(format!("runs from {} to {} where {escapes} escapes are stored", end[0], end[1])));
        }
        Ok(reader)
    }

    pub(super) fn read(&self, first: u64, out: &mut [u16]) -> Result<()> {
        let cols = self.grid.cols();
        let total = self.grid.rows() * cols;
        let end = first.checked_add(out.len() as u64).filter(|&end| end <= total).ok_or_else(|| {
            Error::Invalid(format!("tensor {}: range past the end", self.sign_mantissa.name()))
        })?;
        let strip_words = TILE_ROWS as u64 * cols;
        if strip_words > SCRATCH_WEIGHTS as u64 {
            return self.read_wide(first, end, out);
        }
        let across = self.grid.tiles_across();
        let batch = (SCRATCH_WEIGHTS as u64 / strip_words).max(1);
        let mut buffers = Buffers::default();
        let mut scratch = Vec::new();
        let mut at = first;
        let mut rest = out;
        while at < end {
            let strip = at / strip_words;
            let start = strip * strip_words;
            let strips = batch.min((end - start).div_ceil(strip_words));
            let rows = (strips * TILE_ROWS as u64).min(self.grid.rows() - strip * TILE_ROWS as u64);
            let span = rows * cols;
            let skip = (at - start) as usize;
            let take = (span - skip as u64).min(end - at) as usize;
            let (now, later) = rest.split_at_mut(take);
            rest = later;
            let tiles = strip * across..(strip + strips) * across;
            if skip == 0 && take as u64 == span {
                self.decode(tiles, cols, rows, &mut buffers, now)?;
            } else {
                scratch.resize(span as usize, 0);
                self.decode(tiles, cols, rows, &mut buffers, &mut scratch)?;
                now.copy_from_slice(&scratch[skip..skip + take]);
            }
            at += take as u64;
        }
        Ok(())
    }

    /// Strips that do not fit the scratch buffer are decoded some columns at a time: memory does not depend on the
    /// length of a row, and a row is found without decoding all of its strip.
    fn read_wide(&self, first: u64, end: u64, out: &mut [u16]) -> Result<()> {
        let (rows, cols) = (self.grid.rows(), self.grid.cols());
        let across = self.grid.tiles_across();
        let (strip_rows, tile_cols) = (TILE_ROWS as u64, TILE_COLS as u64);
        let most_tiles = (SCRATCH_WEIGHTS / TILE_WEIGHTS) as u64;
        let (mut buffers, mut scratch) = (Buffers::default(), Vec::new());
        let Some(last) = end.checked_sub(1).filter(|last| *last >= first) else { return Ok(()) };
        for strip in first / cols / strip_rows..=last / cols / strip_rows {
            let top = strip * strip_rows;
            let height = strip_rows.min(rows - top);
            for tile in (0..across).step_by(most_tiles as usize) {
                let tiles = most_tiles.min(across - tile);
                let left = tile * tile_cols;
                let width = (tiles * tile_cols).min(cols - left);
                // What is wanted of each row in these columns.
                let wanted = (0..height).filter_map(|row| {
                    let start = (top + row) * cols + left;
                    let (from, to) = (start.max(first), (start + width).min(end));
                    (from < to).then(|| (row * width + (from - start), from, to))
                });
                let wanted: Vec<(u64, u64, u64)> = wanted.collect();
                if wanted.is_empty() {
                    continue;
                }
                scratch.resize((height * width) as usize, 0);
                let number = strip * across + tile;
                self.decode(number..number + tiles, width, height, &mut buffers, &mut scratch)?;
                for (at, from, to) in wanted {
                    let part = &scratch[at as usize..(at + to - from) as usize];
                    out[(from - first) as usize..(to - first) as usize].copy_from_slice(part);
                }
            }
        }
        Ok(())
    }

    /// Decodes tiles that hold `rows` x `cols` weights: whole strips, or a part of one.
    fn decode(
        &self,
        tiles: Range<u64>,
        cols: u64,
        rows: u64,
        b: &mut Buffers,
        out: &mut [u16],
    ) -> Result<()> {
        let (tile, tiles) = (tiles.start, tiles.end - tiles.start);
        b.sign_mantissa.resize(tiles as usize * TILE_WEIGHTS, 0);
        self.sign_mantissa.read_at(tile * TILE_WEIGHTS as u64, &mut b.sign_mantissa)?;
        b.codes.resize(tiles as usize * TILE_CODE_BYTES, 0);
        self.codes.read_at(tile * TILE_CODE_BYTES as u64, &mut b.codes)?;
        b.offsets.resize(tiles as usize + 1, 0);
        self.offsets.read_at(tile * 4, bytemuck::cast_slice_mut(&mut b.offsets))?;
        let (from, to) = (u64::from(b.offsets[0]), u64::from(b.offsets[tiles as usize]));
        if from > to || to > self.exponents.bytes() || to - from > tiles * TILE_WEIGHTS as u64 {
            return Err(self.offsets.corrupt(format!(
                "tiles {tile} to {} claim escapes {from} to {to} of {}",
                tile + tiles,
                self.exponents.bytes()
            )));
        }
        b.positions.resize((to - from) as usize, 0);
        self.positions.read_at(from * 2, bytemuck::cast_slice_mut(&mut b.positions))?;
        b.exponents.resize((to - from) as usize, 0);
        self.exponents.read_at(from, &mut b.exponents)?;
        let strips = StripsRef {
            sign_mantissa: &b.sign_mantissa,
            codes: &b.codes,
            escape_offsets: &b.offsets,
            escape_positions: &b.positions,
            escape_exponents: &b.exponents,
        };
        decode_strips(self.base, cols as usize, rows as usize, &strips, out)
            .map_err(|e| self.sign_mantissa.corrupt(format!("tiles from {tile}: {e}")))
    }
}

#[derive(Default)]
struct Buffers {
    sign_mantissa: Vec<u8>,
    codes: Vec<u8>,
    offsets: Vec<u32>,
    positions: Vec<u16>,
    exponents: Vec<u8>,
}
