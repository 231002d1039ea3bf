//! Codes to bit planes and back, eight columns at a time.
//!
//! ```text
//! byte k of a u64: code of column k    --pack-->  byte b: bit b of eight codes, column 0 lowest
//! ```

use super::WORD_COLUMNS;

/// The lowest bit of each byte.
const LOW: u64 = 0x0101_0101_0101_0101;
/// Brings bit 8 k to bit 56 + k, for k = 0 .. 8; no other two bits meet.
const GATHER: u64 = 0x0102_0408_1020_4080;

/// Byte b spread over eight bytes: bit k becomes byte k.
const SPREAD: [u64; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut k = 0;
        while k < 8 {
            table[byte] |= (byte as u64 >> k & 1) << (8 * k);
            k += 1;
        }
        byte += 1;
    }
    table
};

/// Packs one plane of a row: bit `plane` of `codes`, `ceil(codes / 32)` words. Columns past the end are 0.
pub fn pack_row(codes: &[u8], plane: u32, out: &mut [u32]) {
    let mut words = out.iter_mut();
    for (codes, word) in codes.chunks(WORD_COLUMNS).zip(&mut words) {
        *word = 0;
        for (i, eight) in codes.chunks(8).enumerate() {
            let mut bytes = [0; 8];
            bytes[..eight.len()].copy_from_slice(eight);
            let bits = (u64::from_le_bytes(bytes) >> plane.min(7)) & LOW;
            *word |= ((bits.wrapping_mul(GATHER) >> 56) as u32) << (8 * i);
        }
    }
    words.for_each(|word| *word = 0);
}

/// Packs a matrix: `codes` are rows of `cols` codes; the planes come out as `[planes, rows, ceil(cols / 32)]`.
pub fn pack(codes: &[u8], cols: usize, planes: u32) -> Vec<u32> {
    let words = cols.div_ceil(WORD_COLUMNS);
    let rows = codes.len().checked_div(cols).unwrap_or(0);
    let mut out = vec![0; planes as usize * rows * words];
    if out.is_empty() {
        return out;
    }
    for (plane, out) in out.chunks_exact_mut(rows * words).enumerate() {
        for (row, out) in codes.chunks_exact(cols).zip(out.chunks_exact_mut(words)) {
            pack_row(row, plane as u32, out);
        }
    }
    out
}

/// The codes of a row of a matrix of `rows` rows from planes `[planes, rows, words]`; of as many columns as `out` has, at
/// most `32 * words`.
pub fn unpack_row(planes: &[u32], rows: usize, words: usize, row: usize, out: &mut [u8]) {
    out.fill(0);
    for (plane, of_plane) in planes.chunks_exact((rows * words).max(1)).enumerate() {
        let of_row = of_plane.get(row * words..(row + 1) * words).unwrap_or_default();
        for (&word, codes) in of_row.iter().zip(out.chunks_mut(WORD_COLUMNS)) {
            for (byte, eight) in word.to_le_bytes().into_iter().zip(codes.chunks_mut(8)) {
                let bits = (SPREAD[usize::from(byte)] << plane.min(7)).to_le_bytes();
                for (code, bit) in eight.iter_mut().zip(bits) {
                    *code |= bit;
                }
            }
        }
    }
}
