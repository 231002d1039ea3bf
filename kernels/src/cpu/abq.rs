//! Products with weights of any width from 1 to 8 bits, and activations of any width or in single precision.
//!
//! ```text
//! bit planes, a row after the other  --at load-->  tiles of 16 rows x 32 columns, a line of 64 bytes a bit; four tiles a
//! strip, block after block. A line's words are its rows: a vector of codes is a shift and a mask, and no sum crosses lanes
//! activations: 8-bit codes (or planes) of up to 16 tokens side by side, made once a product
//! ```
//!
//! A group's sum over codes is an integer and exact; what follows is stated in single precision by [`Matrix::multiply`]
//! and is the same bits on every processor.

mod activation;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod inputs;
mod layout;
mod plain;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use activation::{Grid, NotFinite, quantise};
pub use inputs::Inputs;

use self::inputs::MOST_TOKENS;
pub(super) use self::layout::{Lanes, check as check_stored, fields};
use self::layout::{Line, Sums, Zeros};
use super::Elements;
use super::isa::Isa;
use super::pages::Room;

/// Rows of a tile: the words of a line.
pub const TILE_ROWS: usize = 16;
/// Columns of a block: those of a word of a bit plane.
pub const BLOCK_COLS: usize = 32;
/// Most columns whose products of 8-bit codes a 32-bit sum surely holds: longer groups are added in pieces.
const MOST_COLS: usize = 1 << 15;
/// Tiles of a strip, which lie block by block together: the last one may have fewer.
const STRIP: usize = 4;
/// Rows of a strip: threads that begin with one read memory in order.
pub const STRIP_ROWS: usize = STRIP * TILE_ROWS;

/// A matrix as the encoding stores it. The codes are unsigned, of `planes` bits.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Width of the weights, 1 to 8: the centre of the grid is code 2^(bits - 1).
    pub bits: u8,
    /// Bit planes: `bits`, or one more where the grid has a level more for symmetry.
    pub planes: u8,
    /// Columns of a group, a multiple of 32; `None` for whole rows.
    pub group_size: Option<usize>,
    /// Width of the activations, 1 to 8; `None` where they stay in single precision.
    pub activation_bits: Option<u8>,
    /// `[planes, rows, cols / 32 rounded up]`: bit k % 32 of word k / 32 belongs to column k; none past the columns.
    pub words: &'a [u32],
    /// `[rows, groups]`.
    pub scale: Elements<'a>,
    /// What stands for zero.
    pub zero: Zero<'a>,
}

/// Which code, or which value added to a scaled code, stands for zero.
#[derive(Clone, Copy, Debug)]
pub enum Zero<'a> {
    /// The centre: `w = scale (code - 2^(bits - 1))`.
    Symmetric,
    /// A code a group, `[rows, groups]`: `w = scale (code - zero)`.
    Integer(&'a [u8]),
    /// A value a group, `[rows, groups]`: `w = scale code + offset`.
    Real(Elements<'a>),
}

/// What is wrong with a stored matrix.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fault {
    /// A width or group size that the encoding does not have.
    #[error("{0}")]
    Shape(String),
    /// A component of another size.
    #[error("{component} has {found} elements, not {expected}")]
    Size {
        /// `planes`, `scale`, `offset` or `zero`.
        component: &'static str,
        /// How many there are.
        found: usize,
        /// How many the shape asks for.
        expected: usize,
    },
}

/// A matrix ready for products. It takes the bits of the codes, the scales as they are stored, and for some widths of the
/// activations two bytes a group.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    /// Columns of a piece of a group: at most [`MOST_COLS`].
    group: usize,
    groups: usize,
    bits: u8,
    planes: usize,
    /// Whether every plane has lines of its own, for products by counting bits.
    apart: bool,
    activation_bits: Option<u8>,
    /// `[strip][block][tile][planes]`.
    lines: Room<Line>,
    /// `[strip][group][tile][16]`.
    scale: Lanes,
    zero: Zeros,
    /// Sums of codes, `[strip][group][tile][16]`, where the activations' form asks for them.
    sums: Sums,
}

impl Matrix {
    /// Regroups a stored matrix.
    ///
    /// # Errors
    /// A width or group size out of range, or components whose sizes are not those of the shape.
    pub fn new(stored: &Stored<'_>) -> Result<Self, Fault> {
        layout::regroup(stored)
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let zero = match &self.zero {
            Zeros::Symmetric => 0,
            Zeros::Integer(zeros) => zeros.len(),
            Zeros::Real(lanes) => lanes.bytes(),
        };
        self.lines.len() * size_of::<Line>() + self.scale.bytes() + zero + self.sums.bytes()
    }

    /// The weights of a row: `scale * code + offset`, rounded after each operation, or `scale * (code - zero)`.
    ///
    /// # Panics
    /// Where there is no such row, or `out` is not as long as one.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols);
        for (k, out) in out.iter_mut().enumerate() {
            let code = self.code(row, k);
            let at = self.lanes(row / TILE_ROWS, k / self.group) + row % TILE_ROWS;
            let scale = self.scale.get(at);
            *out = match &self.zero {
                Zeros::Symmetric => scale * (f32::from(code) - self.centre()),
                Zeros::Integer(zeros) => scale * (f32::from(code) - f32::from(zeros[at])),
                Zeros::Real(offset) => scale * f32::from(code) + offset.get(at),
            };
        }
    }

    /// Prepares a panel, `x[feature * tokens + token]`, for products with this matrix or one of the same columns, groups and
    /// widths.
    ///
    /// # Errors
    /// Where activations are to be quantised, one that is NaN or infinite.
    ///
    /// # Panics
    /// Where `x` is not [`Self::cols`] rows of `tokens`.
    pub fn prepare(&self, x: &[f32], tokens: usize, inputs: &mut Inputs) -> Result<(), NotFinite> {
        self.prepare_with(Isa::detect(), x, tokens, inputs)
    }

    fn prepare_with(&self, isa: Isa, x: &[f32], tokens: usize, inputs: &mut Inputs) -> Result<(), NotFinite> {
        assert!(self.cols.checked_mul(tokens) == Some(x.len()));
        match self.activation_bits {
            None => inputs.floats(isa, x, tokens, self.cols, self.group),
            Some(bits) => {
                inputs.integers(isa, x, tokens, self.cols, self.group, bits, self.counts_bits(isa))?
            }
        }
        Ok(())
    }

    /// `out[r * tokens + t]`: the product of row `rows.start + r` with token `t` of what [`Self::prepare`] prepared.
    ///
    /// Activations in single precision, c being 2^(bits - 1): for every group in ascending order
    /// ```text
    /// a = sum (code - c) x        from +0, by fused multiply-adds in ascending order of columns
    /// X = sum x                   eight sums from +0, column k to sum k % 8; sum i takes sum i + 4, i + 2, i + 1
    /// symmetric:  y = scale a + y                       (z zero, o offset; each line's product and sum fused)
    /// integer:    u = (c - z) X + a;  y = scale u + y
    /// real:       y = scale a + y;  o' = scale c + o;  y = o' X + y
    /// ```
    /// Quantised activations, whose codes q_x have step s and zero z_x ([`quantise`]), with exact integers:
    /// ```text
    /// J = sum code (q_x - z_x),  D = sum (q_x - z_x)
    /// symmetric:  y = scale (J - c D) + y
    /// integer:    y = scale (J - z D) + y
    /// real:       y = scale J + y;  y = o D + y
    /// ```
    /// in integers, turned into single precision by rounding to nearest even, each product and sum fused; after all groups s y.
    /// A group of more than 32768 columns counts as several.
    ///
    /// # Panics
    /// Where `rows` are not of the matrix, `out` is of another size, or the inputs were prepared for another shape.
    pub fn multiply(&self, rows: Range<usize>, inputs: &Inputs, out: &mut [f32]) {
        self.multiply_with(Isa::detect(), rows, inputs, out);
    }

    fn multiply_with(&self, isa: Isa, rows: Range<usize>, inputs: &Inputs, out: &mut [f32]) {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let counted = self.activation_bits.is_some() && self.counts_bits(isa);
        assert!(inputs.fits(self.cols, self.group, self.activation_bits, counted));
        let width = inputs.tokens();
        assert!(out.len() == rows.len() * width);
        let mut totals = [[0.0f32; TILE_ROWS]; STRIP * MOST_TOKENS];
        let end = rows.end.div_ceil(TILE_ROWS);
        let mut next = rows.start / TILE_ROWS;
        while next < end {
            let tiles = next..(next / STRIP * STRIP + STRIP).min(end);
            next = tiles.end;
            for chunk in inputs.chunks() {
                let totals = &mut totals[..tiles.len() * chunk.padded];
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512::multiply(self, tiles.clone(), &chunk, totals),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::multiply(self, tiles.clone(), &chunk, totals),
                    Isa::Portable => plain::multiply(self, tiles.clone(), &chunk, totals),
                }
                for (tile, totals) in tiles.clone().zip(totals.chunks_exact(chunk.padded)) {
                    let top = tile * TILE_ROWS;
                    for row in rows.start.max(top)..rows.end.min(top + TILE_ROWS) {
                        let out = &mut out[(row - rows.start) * width + chunk.first..][..chunk.tokens];
                        for (out, totals) in out.iter_mut().zip(totals) {
                            *out = totals[row - top];
                        }
                    }
                }
            }
        }
    }

    /// Whether products with this matrix count the bits that planes of weights and activations share.
    fn counts_bits(&self, isa: Isa) -> bool {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => self.apart && avx512::counts_bits(),
            _ => false,
        }
    }

    fn centre(&self) -> f32 {
        f32::from(1u8 << (self.bits - 1))
    }

    /// Blocks of 32 columns.
    fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK_COLS)
    }

    /// The blocks of a group.
    fn group_blocks(&self, group: usize) -> Range<usize> {
        let per = self.group / BLOCK_COLS;
        group * per..((group + 1) * per).min(self.blocks())
    }

    /// Tiles of the strip of a tile.
    fn strip_tiles(&self, tile: usize) -> usize {
        strip_tiles(self.rows, tile)
    }

    /// Where the lines of a block begin.
    fn block(&self, tile: usize, block: usize) -> usize {
        place(self.rows, self.blocks(), tile, block) * self.planes
    }

    /// Where the scales of a group begin.
    fn lanes(&self, tile: usize, group: usize) -> usize {
        place(self.rows, self.groups, tile, group) * TILE_ROWS
    }
}

/// Tiles of the strip of a tile, of a matrix of `rows`.
fn strip_tiles(rows: usize, tile: usize) -> usize {
    (rows.div_ceil(TILE_ROWS) - tile / STRIP * STRIP).min(STRIP)
}

/// Where part `part` of `parts` of a tile stands, in strips.
fn place(rows: usize, parts: usize, tile: usize, part: usize) -> usize {
    let first = tile / STRIP * STRIP;
    first * parts + part * strip_tiles(rows, tile) + tile - first
}
