//! Matrices of which each four consecutive weights of a row keep two, in device memory.
//!
//! ```text
//! stored     values [rows, cols / 2] in the order of columns; positions, a nibble a quad
//! here       the values of 128 columns in the order in which lanes take them, plain or in fixed12;
//!            beside each tile of 16 x 128 what sparse tensor cores ask for: 32 x two words of positions
//! ```
//!
//! In stretches of 128 columns a tile of 16 x 64 values is multiplied by four `mma` of 32 columns each. Lane 4 g + q takes, of `mma` number
//! 2 h + p, the kept pairs of quads q and q + 4: they become the four values from 32 h + 8 q + 4 p on.

use std::borrow::Cow;

use super::fixed12::{self, Encoded};
use super::{Argument, Buffer, Error, Gpu, Result, View, size32};

/// Columns of a tile.
const TILE_COLS: usize = 128;
/// Their kept values.
const TILE_KEPT: usize = 64;
const TILE_ROWS: usize = 16;
/// Words of a tile's positions.
const TILE_WORDS: usize = 64;
/// Two quads that keep their first two, as padding has them.
const PADDING: u8 = 0x44;

/// A matrix to be copied to a device.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// Output features.
    pub rows: usize,
    /// The kept values, `BF16 [rows, cols / 2]`.
    pub values: Cow<'a, [u16]>,
    /// Where they lie, `[rows, ceil(cols / 8)]`: a nibble a quad, the first place in its lower bits, the even quad in the lower
    /// nibble.
    pub positions: &'a [u8],
}

/// How values lie.
#[derive(Debug)]
enum Values {
    /// `[rows, tiles x 64]`.
    Plain(Buffer),
    /// The same matrix.
    Fixed12(fixed12::Matrix),
}

/// A matrix of two in four, or several one below the other.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    values: Values,
    /// `[strips, tiles, 32, 2]`.
    kept: Buffer,
}

/// Where a kept value of a tile's 64 goes.
fn place(kept: usize) -> usize {
    let (quad, second) = (kept / 2, kept % 2);
    let (mma, quad) = (quad / 8, quad % 8);
    let (half, part) = (mma / 2, mma % 2);
    32 * half + 8 * (quad % 4) + 4 * part + 2 * (quad / 4) + second
}

/// Values `[rows, kept]` as `[rows, whole tiles]` in the order of lanes; what is past a row's end is `padding`.
fn by_lanes(values: &[u16], kept: usize, padding: u16) -> Vec<u16> {
    let stride = kept.next_multiple_of(TILE_KEPT);
    let mut out = vec![padding; values.len() / kept.max(1) * stride];
    for (to, from) in out.chunks_exact_mut(stride.max(1)).zip(values.chunks_exact(kept.max(1))) {
        for (to, from) in to.chunks_exact_mut(TILE_KEPT).zip(from.chunks(TILE_KEPT)) {
            for (i, value) in from.iter().enumerate() {
                to[place(i)] = *value;
            }
        }
    }
    out
}

impl Part<'_> {
    fn check(&self, cols: usize) -> Result<()> {
        let rows = self.rows;
        let invalid = |what: &str| Err(Error::Invalid(format!("a 2:4 matrix of {rows} x {cols}: {what}")));
        let of_row = cols.div_ceil(8);
        if !cols.is_multiple_of(4) || cols == 0 {
            return invalid("its columns are no quads");
        }
        let sizes = (rows.checked_mul(cols / 2), rows.checked_mul(of_row));
        if sizes != (Some(self.values.len()), Some(self.positions.len())) {
            return invalid("components of other sizes");
        }
        let right = |nibble: u8| nibble & 3 < nibble >> 2;
        for row in self.positions.chunks_exact(of_row) {
            if !(0..cols / 4).all(|quad| right(row[quad / 2] >> (4 * (quad % 2)) & 15)) {
                return invalid("a quad whose first kept value does not lie before its second");
            }
        }
        Ok(())
    }

    /// The words of positions of its strips.
    fn kept(&self, cols: usize) -> Vec<u32> {
        let (across, of_row) = (cols.div_ceil(TILE_COLS), cols.div_ceil(8));
        let strips = self.rows.div_ceil(TILE_ROWS);
        // Rows of whole strips and tiles.
        let stride = across * TILE_COLS / 8;
        let mut whole = vec![PADDING; strips * TILE_ROWS * stride];
        for (to, from) in whole.chunks_exact_mut(stride).zip(self.positions.chunks_exact(of_row)) {
            to[..of_row].copy_from_slice(from);
            if !cols.is_multiple_of(8) {
                to[of_row - 1] = from[of_row - 1] & 15 | PADDING & 0xf0;
            }
        }
        let mut words = Vec::with_capacity(strips * across * TILE_WORDS);
        for strip in 0..strips {
            for tile in 0..across {
                for lane in 0..32 {
                    for half in 0..2 {
                        let (g, q) = (lane / 4, lane % 4);
                        // `mma` 2 half + q / 2, sixteen of its columns: two bytes.
                        let at = tile * TILE_COLS / 8 + 4 * (2 * half + q / 2) + 2 * (q % 2);
                        let of = |row: usize| {
                            let from = &whole[(strip * TILE_ROWS + row) * stride + at..];
                            u32::from(u16::from_le_bytes([from[0], from[1]]))
                        };
                        words.push(of(g) | of(g + 8) << 16);
                    }
                }
            }
        }
        words
    }
}

impl Matrix {
    /// Copies matrices of as many columns to the device, one below the other: one matrix to every kernel. In fixed12 values take
    /// three quarters of the room.
    ///
    /// # Errors
    /// [`Error::Invalid`] where components do not fit, positions are not two a quad, or a matrix but the last ends inside a strip of 16
    /// rows; not so much memory.
    pub fn stack(gpu: &Gpu, cols: usize, parts: &[Part<'_>], in_fixed12: bool) -> Result<Self> {
        let mut above = TILE_ROWS;
        for part in parts {
            part.check(cols)?;
            if !above.is_multiple_of(TILE_ROWS) {
                return Err(Error::Invalid(format!(
                    "a matrix of {above} rows above another: only whole strips of 16 can be"
                )));
            }
            above = part.rows;
        }
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        let strips = rows.div_ceil(TILE_ROWS);
        // Kernels count tiles in 32 bits.
        size32("tiles of a 2:4 matrix", strips.saturating_mul(cols.div_ceil(TILE_COLS)))?;
        let (kept, stride) = (cols / 2, (cols / 2).next_multiple_of(TILE_KEPT));
        let values = if in_fixed12 {
            let encode = |part: &Part<'_>| {
                // Padding that has a code: activations are zero there.
                let base = Encoded::best_base(&part.values);
                let words = by_lanes(&part.values, kept, base.unsigned_abs() << 7);
                Encoded::with_base(part.rows, stride, &words, base)
            };
            let encoded = parts.iter().map(encode).collect::<Result<Vec<_>>>()?;
            let list: Vec<fixed12::Part<'_>> = encoded.iter().map(Encoded::part).collect();
            Values::Fixed12(fixed12::Matrix::stack(gpu, stride, &list)?)
        } else {
            let buffer = gpu.allocate(2 * rows * stride)?;
            let mut first = 0;
            for part in parts {
                let end = first + 2 * part.rows * stride;
                buffer.slice(first..end)?.write(&by_lanes(&part.values, kept, 0))?;
                first = end;
            }
            Values::Plain(buffer)
        };
        let mut words = Vec::new();
        parts.iter().for_each(|part| words.extend(part.kept(cols)));
        Ok(Self { rows, cols, values, kept: gpu.upload(&words)? })
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

    /// Whether its values are in fixed12.
    #[must_use]
    pub fn in_fixed12(&self) -> bool {
        matches!(self.values, Values::Fixed12(_))
    }

    /// Bytes in device memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let values = match &self.values {
            Values::Plain(buffer) => buffer.bytes(),
            Values::Fixed12(matrix) => matrix.bytes(),
        };
        values + self.kept.bytes()
    }

    /// Bytes that such a matrix takes on a device, escapes apart.
    #[must_use]
    pub fn bytes_of(rows: usize, cols: usize, in_fixed12: bool) -> u64 {
        let (strips, across) = (rows.div_ceil(TILE_ROWS) as u64, cols.div_ceil(TILE_COLS) as u64);
        let tiles = strips.saturating_mul(across);
        let values = if in_fixed12 {
            // A tile, and where its escapes begin.
            tiles.saturating_mul(1536 + 4)
        } else {
            (2 * TILE_KEPT as u64).saturating_mul(across).saturating_mul(rows as u64)
        };
        values.saturating_add(tiles.saturating_mul(4 * TILE_WORDS as u64))
    }

    /// The first arguments of every kernel that reads it: from a strip of 16 rows on, which must be inside.
    pub(super) fn components_from(&self, strip: usize) -> Vec<Argument> {
        let across = self.cols.div_ceil(TILE_COLS);
        let from = |view: View<'_>, bytes: usize| match view.pointer() {
            Argument::Pointer(address) => Argument::Pointer(address + bytes as u64),
            other => other,
        };
        let mut arguments = match &self.values {
            Values::Plain(words) => {
                vec![from(words.view(), 2 * strip * TILE_ROWS * across * TILE_KEPT)]
            }
            Values::Fixed12(matrix) => matrix.components_from(strip).to_vec(),
        };
        arguments.push(from(self.kept.view(), 4 * strip * across * TILE_WORDS));
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kept_value_has_a_place_of_its_own() {
        let mut places: Vec<usize> = (0..TILE_KEPT).map(place).collect();
        // A lane's words of the first `mma`: quads 0 and 4 of it.
        assert_eq!((places[0], places[1], places[8], places[9]), (0, 1, 2, 3));
        // Of the second one, quad 1.
        assert_eq!(places[16 + 2], 8 + 4);
        places.sort_unstable();
        assert!(places.iter().copied().eq(0..TILE_KEPT));
    }
}
