//! Plain loops that a compiler turns into the vectors of any target: a tile is decoded into the first cache.

use llmpress_entropy::fixed12::{TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

use super::{BadEscapes, Tiles, fold};

/// The product over all strips.
pub(super) fn dot(tiles: &Tiles<'_>, x: &[f32], out: &mut [f32]) -> Result<(), BadEscapes> {
    dot_with(tiles, x, out, |bytes, codes, weights| decode(tiles.base, bytes, codes, weights))
}

/// As [`dot`]. `decode` makes a tile's weights as if nothing were an escape.
#[inline(always)]
pub(super) fn dot_with(
    tiles: &Tiles<'_>,
    x: &[f32],
    out: &mut [f32],
    decode: impl Fn(&[u8; TILE_WEIGHTS], &[u8; TILE_CODE_BYTES], &mut [[f32; TILE_COLS]; TILE_ROWS]),
) -> Result<(), BadEscapes> {
    let mut weights = [[0.0f32; TILE_COLS]; TILE_ROWS];
    let mut tile = 0;
    for out in out.chunks_mut(TILE_ROWS) {
        let mut sums = [[0.0f32; TILE_COLS]; TILE_ROWS];
        for x in x.chunks(TILE_COLS) {
            decode(&tiles.sign_mantissa[tile], &tiles.codes[tile], &mut weights);
            patch(tiles, tile, &mut weights)?;
            for (sums, weights) in sums.iter_mut().zip(&weights) {
                for ((sum, w), x) in sums.iter_mut().zip(weights).zip(x) {
                    *sum = w.mul_add(*x, *sum);
                }
            }
            tile += 1;
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            *out = fold(sums);
        }
    }
    Ok(())
}

/// A tile in single precision, as if nothing were an escape.
pub(in crate::cpu::dot) fn decode(
    base: u32,
    sign_mantissa: &[u8; TILE_WEIGHTS],
    codes: &[u8; TILE_CODE_BYTES],
    weights: &mut [[f32; TILE_COLS]; TILE_ROWS],
) {
    // A lane of a half-tile has eight bytes of row g, then of g + 8; its codes are words of eight.
    let (bytes, _) = sign_mantissa.as_chunks::<8>();
    let (words, _) = codes.as_chunks::<4>();
    for (row, weights) in weights.iter_mut().enumerate() {
        let (weights, _) = weights.as_chunks_mut::<8>();
        for (part, weights) in weights.iter_mut().enumerate() {
            let (half, lane) = (part / 4, 4 * (row % 8) + part % 4);
            let bytes = bytes[64 * half + 2 * lane + row / 8];
            let word = u32::from_le_bytes(words[4 * lane + 2 * half + row / 8]);
            for (i, weight) in weights.iter_mut().enumerate() {
                let code = word >> (4 * (i / 2) + 16 * (i % 2)) & 15;
                let byte = u32::from(bytes[i]);
                // The byte's copy of the sign at bit 23 is the one that its code lacks.
                let sign = (byte >> 7) << 31;
                *weight = f32::from_bits(sign + (byte << 16) + ((code + base) << 23));
            }
        }
    }
}

/// Puts the exponents of a tile's escapes in place.
#[inline(always)]
pub(in crate::cpu::dot) fn patch(
    tiles: &Tiles<'_>,
    tile: usize,
    weights: &mut [[f32; TILE_COLS]; TILE_ROWS],
) -> Result<(), BadEscapes> {
    let (positions, exponents) = tiles.escapes(tile);
    if positions.is_empty() {
        return Ok(());
    }
    let (rows, cols) = tiles.extent(tile);
    let mut next = 0;
    for (&position, &exponent) in positions.iter().zip(exponents) {
        let position = usize::from(position);
        let (row, col) = (position / TILE_COLS, position % TILE_COLS);
        if position < next || row >= rows || col >= cols {
            return Err(BadEscapes { tile });
        }
        next = position + 1;
        let weight = weights[row][col].to_bits();
        // From code 0 to the exponent.
        let difference = u32::from(exponent).wrapping_sub(tiles.base + (weight >> 31)) << 23;
        weights[row][col] = f32::from_bits(weight.wrapping_add(difference));
    }
    Ok(())
}
