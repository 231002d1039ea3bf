//! fixed12: twelve bits a weight at a fixed rate, laid out for tensor cores.
//!
//! ```text
//! BF16 word  =  sign (1) | exponent (8) | mantissa (7)
//! plane A    :  sign << 7 | mantissa                  a byte a weight      `sign_mantissa`
//! plane B    :  exponent - sign - base, 0..=15        a nibble a weight    `codes`
//! escapes    :  weights outside of the window of 16   position, exponent   `escape_*`
//! ```
//!
//! A matrix is padded to a multiple of 16 rows and 64 columns and cut into tiles of 16 x 64 weights,
//! strip of 16 rows after strip, left to right within a strip. Inside a tile the bytes lie in the
//! order in which the 32 lanes of a warp hold the A fragments of `mma.m16n8k16`; see [`byte_index`]
//! and [`nibble_index`].
//!
//! The sign is folded into the code so that a kernel needs one addition for exponent and mantissa:
//! plane A's byte at bit 0 plus the code at bit 7 plus the base at bit 7 cancels the copy of the sign
//! that the byte carries into the exponent. `base` is in 0..=239: then every code decodes to an
//! exponent in 0..=255 and two weights can be added in one 32-bit register with no carry between them.
//!
//! An escape keeps its byte in plane A, stores code 0, and is patched from its tile's list. Padding is
//! byte 0 and code 0. The encoding of a matrix under a base is unique, and decoding refuses anything else.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod escapes;
mod histogram;
mod portable;
mod reference;
mod strips;

pub use histogram::{Histogram, Window};
pub use reference::{decode_strips_reference, encode_strips_reference};
pub use strips::{decode_strips, encode_strips};

/// Rows of a tile: the M of `mma.m16n8k16`.
pub const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub const TILE_COLS: usize = 64;
/// Weights of a tile, and its bytes in plane A.
pub const TILE_WEIGHTS: usize = TILE_ROWS * TILE_COLS;
/// Bytes of a tile in plane B.
pub const TILE_CODE_BYTES: usize = TILE_WEIGHTS / 2;

/// The lowest base: a code never stands for a negative exponent.
pub const MIN_BASE: i16 = 0;
/// The highest base: code 15 of a negative weight is exponent 255.
pub const MAX_BASE: i16 = 239;

/// Where the byte of the weight at (`row`, `col`) of a tile lies in the tile's plane A.
///
/// Lane `4 g + q` holds, in each half of 32 columns, eight bytes of row `g`, then eight of row `g + 8`.
#[must_use]
pub const fn byte_index(row: usize, col: usize) -> usize {
    let (half, lane) = (col / 32, 4 * (row % 8) + col % 32 / 8);
    512 * half + 16 * lane + 8 * (row / 8) + col % 8
}

/// Where the code of the weight at (`row`, `col`) of a tile lies in the tile's plane B: the number of
/// its nibble, so byte `n / 2`, the low half where `n` is even.
///
/// Lane `4 g + q` holds four 32-bit words (half 0 row `g`, half 0 row `g + 8`, half 1 row `g`, half 1
/// row `g + 8`). Columns `2 j` and `2 j + 1` of a word's eight lie at its bits `4 j` and `16 + 4 j`.
#[must_use]
pub const fn nibble_index(row: usize, col: usize) -> usize {
    let (half, lane) = (col / 32, 4 * (row % 8) + col % 32 / 8);
    let word = 4 * lane + 2 * half + row / 8;
    8 * word + 4 * (col % 2) + col % 8 / 2
}

/// The tiles that cover a matrix, and the sizes of its components.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    rows: u64,
    cols: u64,
    tiles: u64,
}

impl Grid {
    /// The grid of a `rows` x `cols` matrix; `None` where a size does not fit 64 bits.
    #[must_use]
    pub fn new(rows: u64, cols: u64) -> Option<Self> {
        let tiles = rows.div_ceil(TILE_ROWS as u64).checked_mul(cols.div_ceil(TILE_COLS as u64))?;
        // The largest component is plane A; the offsets are smaller from the first tile on.
        tiles.checked_mul(TILE_WEIGHTS as u64)?;
        Some(Self { rows, cols, tiles })
    }

    /// Rows of the matrix.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Columns of the matrix.
    #[must_use]
    pub fn cols(&self) -> u64 {
        self.cols
    }

    /// Strips of 16 rows, the last one padded.
    #[must_use]
    pub fn strips(&self) -> u64 {
        self.rows.div_ceil(TILE_ROWS as u64)
    }

    /// Tiles in a strip, the last one padded.
    #[must_use]
    pub fn tiles_across(&self) -> u64 {
        self.cols.div_ceil(TILE_COLS as u64)
    }

    /// Tiles in all.
    #[must_use]
    pub fn tiles(&self) -> u64 {
        self.tiles
    }

    /// Bytes of `sign_mantissa`.
    #[must_use]
    pub fn sign_mantissa_bytes(&self) -> u64 {
        self.tiles * TILE_WEIGHTS as u64
    }

    /// Bytes of `codes`.
    #[must_use]
    pub fn codes_bytes(&self) -> u64 {
        self.tiles * TILE_CODE_BYTES as u64
    }

    /// Bytes of `escape_offsets`: a 32-bit word a tile and one for the end.
    #[must_use]
    pub fn escape_offsets_bytes(&self) -> u64 {
        (self.tiles + 1) * 4
    }
}

/// Encoded strips, in buffers that can be used again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strips {
    /// Plane A, 1024 bytes a tile.
    pub sign_mantissa: Vec<u8>,
    /// Plane B, 512 bytes a tile.
    pub codes: Vec<u8>,
    /// How many weights of each tile are escapes.
    pub escape_counts: Vec<u32>,
    /// Positions of the escapes, `row * 64 + col` in their tile, ascending within a tile.
    pub escape_positions: Vec<u16>,
    /// Exponents of the escapes.
    pub escape_exponents: Vec<u8>,
}

/// The components of a run of whole strips.
#[derive(Clone, Copy, Debug)]
pub struct StripsRef<'a> {
    /// Plane A, 1024 bytes a tile.
    pub sign_mantissa: &'a [u8],
    /// Plane B, 512 bytes a tile.
    pub codes: &'a [u8],
    /// One entry a tile and one for the end. Only differences from the first entry count, so a slice
    /// of a whole matrix's `escape_offsets` serves.
    pub escape_offsets: &'a [u32],
    /// Positions of the escapes of these strips.
    pub escape_positions: &'a [u16],
    /// Exponents of the escapes of these strips.
    pub escape_exponents: &'a [u8],
}

/// The word that padding decodes to: byte 0 and code 0 under `base`.
fn padding_word(base: u16) -> u16 {
    base << 7
}
