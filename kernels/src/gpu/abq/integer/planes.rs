//! Matrices whose bit planes are multiplied with quantised activations.

use std::mem::discriminant;

use super::super::super::{Argument, Buffer, Error, Gpu, Result, size32};
use super::super::layout::{TILE_ROWS, by_strip};
use super::super::matrix::{copy, from};
use super::super::stored::{Stored, Zero, check, check_stack};

/// Columns of a tile, and of what no group divides.
const TILE_COLS: usize = 128;
const BLOCK_COLS: usize = 32;
const BLOCKS: usize = TILE_COLS / BLOCK_COLS;
const LANES: usize = 32;
/// Most columns whose products of 8-bit codes a 32-bit sum surely holds: longer groups are added in pieces.
const MOST_COLS: usize = 1 << 15;

/// A matrix, or several one below the other. It takes the bits of the codes, and for each group of a row four bytes for the scale,
/// four for the sum of codes, and one or four for an integer or real zero.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    planes: usize,
    centre: u32,
    activation_bits: u32,
    groups: usize,
    /// Blocks of 32 columns of a group.
    length: usize,
    codes: Buffer,
    scale: Buffer,
    offset: Option<Buffer>,
    zeros: Option<Buffer>,
    sums: Buffer,
}

/// Columns of a piece of a group that a 32-bit sum holds.
pub(in super::super) fn piece(stored: &Stored<'_>) -> usize {
    let whole = stored.cols.next_multiple_of(BLOCK_COLS);
    let asked = stored.group_size.unwrap_or(whole).min(whole);
    match asked {
        fits @ ..=MOST_COLS => fits,
        _ if stored.cols <= asked => MOST_COLS,
        _ => 1 << asked.trailing_zeros().min(MOST_COLS.trailing_zeros()),
    }
}

/// Bit e of a byte at bit 8 (e % 4) + e / 4 (kernels/cuda/abq_integer.cuh).
fn spread() -> [u32; 256] {
    let mut table = [0; 256];
    for (byte, to) in table.iter_mut().enumerate() {
        *to = (0..8).filter(|e| byte >> e & 1 == 1).map(|e| 1 << (8 * (e % 4) + e / 4)).sum();
    }
    table
}

/// Bytes of a tile.
pub(super) fn tile_bytes(planes: usize) -> usize {
    TILE_ROWS * TILE_COLS * planes / 8
}

/// The byte of a tile where word 2 i + r of a lane lies, of plane i and row g + 8 r: pieces of 16 bytes of all lanes, then one of 8.
fn word_place(planes: usize, lane: usize, word: usize) -> usize {
    let vectors = planes / 2;
    if word < 4 * vectors {
        (word / 4 * LANES + lane) * 16 + word % 4 * 4
    } else {
        vectors * 512 + lane * 8 + word % 4 * 4
    }
}

/// The tiles of a matrix, strip by strip, padded with zeros.
fn tiles(stored: &Stored<'_>) -> Vec<u8> {
    let (rows, planes) = (stored.rows, usize::from(stored.planes));
    let (across, words) = (stored.cols.div_ceil(TILE_COLS), stored.cols.div_ceil(BLOCK_COLS));
    let mut out = vec![0u8; rows.div_ceil(TILE_ROWS) * across * tile_bytes(planes)];
    let spread = spread();
    for (at, tile) in out.chunks_mut(tile_bytes(planes)).enumerate() {
        let (strip, across) = (at / across, at % across);
        for word in 0..2 * planes {
            for g in 0..8 {
                let row = strip * TILE_ROWS + g + word % 2 * 8;
                if row >= rows {
                    continue;
                }
                let of_row = &stored.words[(word / 2 * rows + row) * words..][..words];
                let mut lanes = [0u32; 4];
                for (w, source) in of_row.iter().skip(across * BLOCKS).take(BLOCKS).enumerate() {
                    for (lane, byte) in lanes.iter_mut().zip(source.to_le_bytes()) {
                        *lane |= spread[usize::from(byte)] << (2 * w);
                    }
                }
                for (q, lane) in lanes.into_iter().enumerate() {
                    let at = word_place(planes, 4 * g + q, word);
                    tile[at..at + 4].copy_from_slice(&lane.to_le_bytes());
                }
            }
        }
    }
    out
}

impl Matrix {
    /// Copies a matrix to the device.
    ///
    /// # Errors
    /// [`Error::Invalid`] where its components do not belong together or it says no width of activations; not so much memory.
    pub fn upload(gpu: &Gpu, stored: &Stored<'_>) -> Result<Self> {
        Self::stack(gpu, std::slice::from_ref(stored))
    }

    /// Copies matrices of the same columns, widths and groups to the device, one below the other: one matrix to every kernel.
    ///
    /// # Errors
    /// Those of [`Self::upload`]; a matrix but the last ends inside a strip of 16 rows.
    pub fn stack(gpu: &Gpu, parts: &[Stored<'_>]) -> Result<Self> {
        let rows = check_stack(parts)?;
        parts.iter().try_for_each(|part| check(part).map(|_| ()))?;
        let first = &parts[0];
        let (cols, planes, piece) = (first.cols, usize::from(first.planes), piece(first));
        let Some(activation_bits) = first.activation_bits.filter(|bits| (1..=8).contains(bits)) else {
            return Err(Error::Invalid("integer products take activations of 1 to 8 bits".to_owned()));
        };
        let across = cols.div_ceil(TILE_COLS);
        size32("tiles of an abq matrix", rows.div_ceil(TILE_ROWS).saturating_mul(across))?;
        let groups = cols.div_ceil(piece);
        let codes = gpu.allocate(rows.div_ceil(TILE_ROWS) * across * tile_bytes(planes))?;
        let (mut scale, mut offset, mut zeros, mut sums) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut at = 0;
        for part in parts {
            let asked = check(part)?;
            if discriminant(&part.zero) != discriminant(&first.zero) {
                return Err(Error::Invalid("abq matrices with zeros of different kinds".to_owned()));
            }
            let bytes = tiles(part);
            codes.slice(at..at + bytes.len())?.write(&bytes)?;
            at += bytes.len();
            // Where the group of a piece is stored.
            let place = |row: usize, group: usize| {
                row * asked + part.group_size.map_or(0, |size| group * piece / size)
            };
            scale.extend(by_strip(part.rows, groups, |row, group| part.scale.get(place(row, group))));
            match part.zero {
                Zero::Symmetric => {}
                Zero::Integer(zero) => {
                    zeros.extend(by_strip(part.rows, groups, |row, group| zero[place(row, group)]));
                }
                Zero::Real(of) => {
                    offset.extend(by_strip(part.rows, groups, |row, group| of.get(place(row, group))));
                }
            }
            let words = cols.div_ceil(BLOCK_COLS);
            sums.extend(by_strip(part.rows, groups, |row, group| {
                let blocks = group * piece / BLOCK_COLS..((group + 1) * piece / BLOCK_COLS).min(words);
                (0..planes).fold(0i32, |sum, plane| {
                    let words = &part.words[(plane * part.rows + row) * words..][blocks.clone()];
                    sum + ((words.iter().map(|word| word.count_ones()).sum::<u32>() as i32) << plane)
                })
            }));
        }
        let optional = |buffer: Result<Buffer>, any: bool| if any { buffer.map(Some) } else { Ok(None) };
        Ok(Self {
            rows,
            cols,
            planes,
            centre: 1 << (first.bits - 1),
            activation_bits: u32::from(activation_bits),
            groups,
            // A single group may as well end with a tile.
            length: if groups == 1 { across * BLOCKS } else { piece / BLOCK_COLS },
            codes,
            scale: gpu.upload(&scale)?,
            offset: optional(gpu.upload(&offset), !offset.is_empty())?,
            zeros: optional(gpu.upload(&zeros), !zeros.is_empty())?,
            sums: gpu.upload(&sums)?,
        })
    }

    /// Another one with the same weights.
    ///
    /// # Errors
    /// Not so much memory.
    pub fn duplicate(&self, gpu: &Gpu) -> Result<Self> {
        let optional = |buffer: &Option<Buffer>| buffer.as_ref().map(|buffer| copy(gpu, buffer)).transpose();
        Ok(Self {
            codes: copy(gpu, &self.codes)?,
            scale: copy(gpu, &self.scale)?,
            sums: copy(gpu, &self.sums)?,
            offset: optional(&self.offset)?,
            zeros: optional(&self.zeros)?,
            ..*self
        })
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

    /// Bits of a code of a weight.
    #[must_use]
    pub fn planes(&self) -> usize {
        self.planes
    }

    /// Bits of a code of an activation.
    #[must_use]
    pub fn activation_bits(&self) -> u32 {
        self.activation_bits
    }

    /// Bytes in device memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let some = |buffer: &Option<Buffer>| buffer.as_ref().map_or(0, Buffer::bytes);
        self.codes.bytes() + self.scale.bytes() + self.sums.bytes() + some(&self.offset) + some(&self.zeros)
    }

    /// Groups of a row, and their blocks of 32 columns.
    pub(super) fn groups(&self) -> (usize, usize) {
        (self.groups, self.length)
    }

    /// Whether groups end with tiles, as counting bits asks for.
    pub(super) fn has_whole_tiles(&self) -> bool {
        self.length.is_multiple_of(BLOCKS)
    }

    /// Tiles of a strip.
    pub(super) fn across(&self) -> usize {
        self.cols.div_ceil(TILE_COLS)
    }

    /// What every product reads, from a strip of 16 rows on.
    pub(super) fn arguments_from(&self, strip: usize) -> Result<[Argument; 8]> {
        let lanes = strip * self.groups * TILE_ROWS;
        let optional = |buffer: &Option<Buffer>, each: usize| {
            buffer.as_ref().map_or(Argument::Pointer(0), |buffer| from(buffer, each * lanes))
        };
        Ok([
            from(&self.codes, strip * self.across() * tile_bytes(self.planes)),
            from(&self.scale, 4 * lanes),
            optional(&self.offset, 4),
            optional(&self.zeros, 1),
            from(&self.sums, 4 * lanes),
            Argument::U32(self.centre),
            Argument::U32(size32("groups", self.groups)?),
            Argument::U32(size32("columns of a group", self.length)?),
        ])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, clippy::unwrap_used)]
    use super::*;
    use crate::cpu::Elements;

    #[test]
    fn every_word_of_a_tile_has_a_place_of_its_own() {
        for planes in 1..=8 {
            let mut places: Vec<usize> = (0..LANES)
                .flat_map(|lane| (0..2 * planes).map(move |word| word_place(planes, lane, word)))
                .collect();
            places.sort_unstable();
            assert!(places.iter().enumerate().all(|(i, place)| *place == 4 * i), "{planes}");
            assert_eq!(4 * places.len(), tile_bytes(planes));
        }
    }

    #[test]
    fn groups_that_a_sum_does_not_hold_are_cut_into_pieces() {
        let of = |cols, group_size| {
            piece(&Stored {
                rows: 1,
                cols,
                bits: 8,
                planes: 8,
                group_size,
                activation_bits: Some(8),
                words: &[],
                scale: Elements::F32(&[]),
                zero: Zero::Symmetric,
            })
        };
        assert_eq!(of(4096, None), 4096);
        assert_eq!(of(100, Some(128)), 128);
        assert_eq!(of(100, None), 128);
        assert_eq!(of(40_000, None), MOST_COLS);
        assert_eq!(of(100_000, Some(48_000)), 128);
        assert_eq!(of(100_000, Some(1 << 16)), MOST_COLS);
    }
}
