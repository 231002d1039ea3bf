//! A tile at a time in plain Rust: loops over half rows that any target's vectors take, eight codes at a
//! time packed in a register.

use super::{TILE_CODE_BYTES, TILE_ROWS, TILE_WEIGHTS};

/// Columns that are handled together: a half row, 4 lanes of 8.
const HALF: usize = 32;

/// Encodes a tile. Bit `col` of the result's entry `row` marks an escape.
pub(super) fn encode_tile(
    base: u16,
    words: &[u16],
    stride: usize,
    sign_mantissa: &mut [u8; TILE_WEIGHTS],
    codes: &mut [u8; TILE_CODE_BYTES],
) -> [u64; TILE_ROWS] {
    let mut masks = [0; TILE_ROWS];
    for (row, mask) in masks.iter_mut().enumerate() {
        for half in 0..2 {
            let words = &words[row * stride + half * HALF..][..HALF];
            let mut bytes = [0_u8; HALF];
            let mut nibbles = [0_u8; HALF];
            let mut beyond = 0;
            for ((&word, byte), nibble) in words.iter().zip(&mut bytes).zip(&mut nibbles) {
                *byte = (word >> 8 & 0x80 | word & 0x7f) as u8;
                let code = (word >> 7 & 0xff).wrapping_sub(word >> 15).wrapping_sub(base);
                beyond |= code;
                *nibble = if code < 16 { code as u8 } else { 0 };
            }
            if beyond >= 16 {
                for (col, &word) in words.iter().enumerate() {
                    let code = (word >> 7 & 0xff).wrapping_sub(word >> 15).wrapping_sub(base);
                    *mask |= u64::from(code >= 16) << (half * HALF + col);
                }
            }
            let (byte_groups, _) = bytes.as_chunks::<8>();
            let (nibble_groups, _) = nibbles.as_chunks::<8>();
            for (q, (bytes, nibbles)) in byte_groups.iter().zip(nibble_groups).enumerate() {
                let lane = 4 * (row % 8) + q;
                let at = 512 * half + 16 * lane + 8 * (row / 8);
                sign_mantissa[at..at + 8].copy_from_slice(bytes);
                let at = 16 * lane + 8 * half + 4 * (row / 8);
                codes[at..at + 4].copy_from_slice(&pack(*nibbles).to_le_bytes());
            }
        }
    }
    masks
}

/// Decodes a tile, escapes and padding as if they had codes.
pub(super) fn decode_tile(
    base: u16,
    sign_mantissa: &[u8; TILE_WEIGHTS],
    codes: &[u8; TILE_CODE_BYTES],
    words: &mut [u16],
    stride: usize,
) {
    for row in 0..TILE_ROWS {
        for half in 0..2 {
            let mut bytes = [0_u8; HALF];
            let mut nibbles = [0_u8; HALF];
            let (byte_groups, _) = bytes.as_chunks_mut::<8>();
            let (nibble_groups, _) = nibbles.as_chunks_mut::<8>();
            for (q, (bytes, nibbles)) in byte_groups.iter_mut().zip(nibble_groups).enumerate() {
                let lane = 4 * (row % 8) + q;
                let at = 512 * half + 16 * lane + 8 * (row / 8);
                bytes.copy_from_slice(&sign_mantissa[at..at + 8]);
                let at = 16 * lane + 8 * half + 4 * (row / 8);
                *nibbles =
                    unpack(u32::from_le_bytes([codes[at], codes[at + 1], codes[at + 2], codes[at + 3]]));
            }
            let words = &mut words[row * stride + half * HALF..][..HALF];
            for ((word, &byte), &nibble) in words.iter_mut().zip(&bytes).zip(&nibbles) {
                let byte = u16::from(byte);
                *word = (byte << 8 & 0x8000) | (byte + ((u16::from(nibble) + base) << 7));
            }
        }
    }
}

/// Eight codes, a byte each, to a word with pair j at bits 4j and 16 + 4j.
fn pack(nibbles: [u8; 8]) -> u32 {
    // Even columns stand at bits 0, 16, 32, 48 and odd ones 8 above.
    let x = u64::from_le_bytes(nibbles);
    let gather = |x: u64| {
        let x = x & 0x000f_000f_000f_000f;
        let x = (x | x >> 12) & 0x0000_00ff_0000_00ff;
        (x | x >> 24) as u32 & 0xffff
    };
    gather(x) | gather(x >> 8) << 16
}

/// The inverse of [`pack`].
fn unpack(word: u32) -> [u8; 8] {
    let spread = |x: u64| {
        let x = (x | x << 24) & 0x0000_00ff_0000_00ff;
        (x | x << 12) & 0x000f_000f_000f_000f
    };
    (spread(u64::from(word & 0xffff)) | spread(u64::from(word >> 16)) << 8).to_le_bytes()
}
