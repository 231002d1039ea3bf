//! The weights that have no code.

use super::{TILE_COLS, TILE_ROWS, TILE_WEIGHTS};
use crate::Error;

/// Appends the escapes of a tile; bit `col` of `masks[row]` marks one.
pub(super) fn list(
    masks: &[u64; TILE_ROWS],
    words: &[u16],
    stride: usize,
    positions: &mut Vec<u16>,
    exponents: &mut Vec<u8>,
) {
    if masks.iter().fold(0, |any, mask| any | mask) == 0 {
        return;
    }
    for (row, mut mask) in masks.iter().copied().enumerate() {
        while mask != 0 {
            let col = mask.trailing_zeros() as usize;
            positions.push((row * TILE_COLS + col) as u16);
            exponents.push((words[row * stride + col] >> 7) as u8);
            mask &= mask - 1;
        }
    }
}

/// Puts the exponents of a tile's escapes in place. `(rows, cols)` is what of the tile is no padding.
pub(super) fn patch(
    base: u16,
    tile: usize,
    positions: &[u16],
    exponents: &[u8],
    (rows, cols): (usize, usize),
    words: &mut [u16],
    stride: usize,
) -> Result<(), Error> {
    let mut next = 0;
    for (&position, &exponent) in positions.iter().zip(exponents) {
        let position = usize::from(position);
        if position >= TILE_WEIGHTS {
            return Err(Error::corrupt("escape_positions", format!("{position} in tile {tile}")));
        }
        if position < next {
            return Err(Error::corrupt("escape_positions", format!("{position} is out of order")));
        }
        next = position + 1;
        let (row, col) = (position / TILE_COLS, position % TILE_COLS);
        if row >= rows || col >= cols {
            return Err(Error::corrupt("escape_positions", format!("{position} is padding")));
        }
        let word = &mut words[row * stride + col];
        let zero = base + (*word >> 15);
        let code = (*word >> 7 & 0xff) - zero;
        if code != 0 {
            return Err(Error::corrupt("codes", format!("escape with code {code}")));
        }
        if (zero..zero + 16).contains(&u16::from(exponent)) {
            return Err(Error::corrupt("escape_exponents", format!("{exponent} has a code")));
        }
        *word = *word & 0x807f | u16::from(exponent) << 7;
    }
    Ok(())
}
