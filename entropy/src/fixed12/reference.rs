//! The coder weight by weight, as the format says it: what every fast path is compared with.

use super::strips::{Layout, padding_error};
use super::{Strips, StripsRef, TILE_COLS, TILE_ROWS, TILE_WEIGHTS, byte_index, nibble_index};
use crate::Error;

/// [`encode_strips`](super::encode_strips), weight by weight.
///
/// # Errors
/// As [`encode_strips`](super::encode_strips).
pub fn encode_strips_reference(base: i16, cols: usize, words: &[u16], out: &mut Strips) -> Result<(), Error> {
    let layout = Layout::of_words(base, cols, words.len())?;
    *out = Strips::default();
    for tile in 0..layout.tiles() {
        let mut sign_mantissa = [0_u8; TILE_WEIGHTS];
        let mut codes = [0_u8; TILE_WEIGHTS / 2];
        let mut escapes = 0;
        for row in 0..TILE_ROWS {
            for col in 0..TILE_COLS {
                let Some(index) = layout.index(tile, row, col) else { continue };
                let word = words[index];
                let (sign, exponent, mantissa) = (word >> 15, (word >> 7) & 0xff, word & 0x7f);
                sign_mantissa[byte_index(row, col)] = (sign << 7 | mantissa) as u8;
                let code = exponent as i16 - sign as i16 - base;
                if (0..16).contains(&code) {
                    let nibble = nibble_index(row, col);
                    codes[nibble / 2] |= (code as u8) << (nibble % 2 * 4);
                } else {
                    escapes += 1;
                    out.escape_positions.push((row * TILE_COLS + col) as u16);
                    out.escape_exponents.push(exponent as u8);
                }
            }
        }
        out.sign_mantissa.extend_from_slice(&sign_mantissa);
        out.codes.extend_from_slice(&codes);
        out.escape_counts.push(escapes);
    }
    Ok(())
}

/// [`decode_strips`](super::decode_strips), weight by weight.
///
/// # Errors
/// As [`decode_strips`](super::decode_strips).
pub fn decode_strips_reference(
    base: i16,
    cols: usize,
    rows: usize,
    strips: &StripsRef<'_>,
    out: &mut [u16],
) -> Result<(), Error> {
    let layout = Layout::of_strips(base, cols, rows, strips, out.len())?;
    let mut escape = 0;
    for tile in 0..layout.tiles() {
        let sign_mantissa = &strips.sign_mantissa[tile * TILE_WEIGHTS..][..TILE_WEIGHTS];
        let codes = &strips.codes[tile * TILE_WEIGHTS / 2..][..TILE_WEIGHTS / 2];
        for row in 0..TILE_ROWS {
            for col in 0..TILE_COLS {
                let byte = u16::from(sign_mantissa[byte_index(row, col)]);
                let nibble = nibble_index(row, col);
                let code = u16::from(codes[nibble / 2] >> (nibble % 2 * 4) & 15);
                let (sign, mantissa) = (byte >> 7, byte & 0x7f);
                match layout.index(tile, row, col) {
                    Some(index) => {
                        let exponent = base as u16 + code + sign;
                        out[index] = sign << 15 | exponent << 7 | mantissa;
                    }
                    None if byte != 0 => return Err(padding_error("sign_mantissa", tile)),
                    None if code != 0 => return Err(padding_error("codes", tile)),
                    None => {}
                }
            }
        }
        let end = escape + (strips.escape_offsets[tile + 1] - strips.escape_offsets[tile]) as usize;
        let mut last = None;
        for (&position, &exponent) in
            strips.escape_positions[escape..end].iter().zip(&strips.escape_exponents[escape..end])
        {
            let position = usize::from(position);
            if position >= TILE_WEIGHTS {
                return Err(Error::corrupt("escape_positions", format!("{position} in tile {tile}")));
            }
            if last.is_some_and(|last| last >= position) {
                return Err(Error::corrupt("escape_positions", format!("{position} is out of order")));
            }
            last = Some(position);
            let Some(index) = layout.index(tile, position / TILE_COLS, position % TILE_COLS) else {
                return Err(Error::corrupt("escape_positions", format!("{position} is padding")));
            };
            let (word, exponent) = (out[index], u16::from(exponent));
            let code = i32::from(word >> 7 & 0xff) - i32::from(word >> 15) - i32::from(base);
            if code != 0 {
                return Err(Error::corrupt("codes", format!("escape with code {code}")));
            }
            let code = i32::from(exponent) - i32::from(word >> 15) - i32::from(base);
            if (0..16).contains(&code) {
                return Err(Error::corrupt("escape_exponents", format!("{exponent} has a code")));
            }
            out[index] = word & 0x807f | exponent << 7;
        }
        escape = end;
    }
    Ok(())
}
