//! Codes in the order in which the tile loops read them.

use crate::cpu::abq::Stored;

/// Rows and columns of a tile.
pub(super) const TILE_ROWS: usize = 16;
pub(super) const TILE_COLS: usize = 64;
/// Columns in which no group begins or ends.
pub(super) const HALF_COLS: usize = 32;
const LANES: usize = 32;

/// Bytes of a tile of codes of so many bits.
pub(super) fn tile_bytes(bits: usize) -> usize {
    TILE_ROWS * TILE_COLS * bits / 8
}

/// Word and bit where bit `bit` of the first code of pair `pair` lies among a lane's words (kernels/cuda/abq.cuh); the second
/// one's lies 16 bits above.
pub(super) fn place(bits: usize, pair: usize, bit: usize) -> (usize, usize) {
    let (whole, rest) = (16 / bits, 16 % bits);
    match pair.checked_sub(whole * bits) {
        None => (pair / whole, pair % whole * bits + bit),
        Some(left) => {
            let at = left * bits + bit;
            (at / rest, whole * bits + at % rest)
        }
    }
}

/// The byte of a tile where word `word` of a lane lies: pieces of 16 bytes of all lanes, then one of 8, then one of 4.
fn word_place(bits: usize, lane: usize, word: usize) -> usize {
    let (vectors, long) = (bits / 4, bits % 4 / 2);
    if word < 4 * vectors {
        (word / 4 * LANES + lane) * 16 + word % 4 * 4
    } else if word < 4 * vectors + 2 * long {
        vectors * 512 + lane * 8 + word % 4 * 4
    } else {
        vectors * 512 + long * 256 + lane * 4
    }
}

/// What a byte of a plane adds to a lane's words: the codes of eight columns of a row.
struct Spread {
    bits: usize,
    /// Of each plane, half tile, row of two, and byte.
    table: Vec<[u32; 8]>,
}

impl Spread {
    fn new(bits: usize) -> Self {
        let mut table = Vec::with_capacity(bits * 4 * 256);
        for plane in 0..bits {
            for (half, row) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                for byte in 0..256usize {
                    let mut words = [0u32; 8];
                    for k in (0..8).filter(|k| byte >> k & 1 == 1) {
                        let (word, at) = place(bits, half * 8 + k / 4 * 4 + k / 2 % 2 * 2 + row, plane);
                        words[word] |= 1 << (at + 16 * (k % 2));
                    }
                    table.push(words);
                }
            }
        }
        Self { bits, table }
    }

    /// Adds the byte of a plane to the words of the lane that reads it.
    fn add(&self, words: &mut [u32; 8], plane: usize, half: usize, row: usize, byte: u8) {
        let from = &self.table[((plane * 2 + half) * 2 + row) * 256 + usize::from(byte)];
        words[..self.bits].iter_mut().zip(from).for_each(|(to, from)| *to |= from);
    }
}

/// The tiles of a matrix, strip by strip, padded with zeros.
pub(super) fn tiles(stored: &Stored<'_>) -> Vec<u8> {
    let (rows, cols, bits) = (stored.rows, stored.cols, usize::from(stored.planes));
    let (strips, across, words) = (rows.div_ceil(TILE_ROWS), cols.div_ceil(TILE_COLS), cols.div_ceil(32));
    let mut out = vec![0u8; strips * across * tile_bytes(bits)];
    let spread = Spread::new(bits);
    for (at, tile) in out.chunks_mut(tile_bytes(bits)).enumerate() {
        let (strip, across) = (at / across, at % across);
        for lane in 0..LANES {
            let mut lane_words = [0u32; 8];
            for row in 0..2 {
                let n = strip * TILE_ROWS + lane / 4 + 8 * row;
                for half in 0..2 {
                    let k_word = 2 * across + half;
                    if n >= rows || k_word >= words {
                        continue;
                    }
                    for plane in 0..bits {
                        let word = stored.words[(plane * rows + n) * words + k_word];
                        spread.add(&mut lane_words, plane, half, row, word.to_le_bytes()[lane % 4]);
                    }
                }
            }
            for (word, bytes) in lane_words[..bits].iter().enumerate() {
                tile[word_place(bits, lane, word)..][..4].copy_from_slice(&bytes.to_le_bytes());
            }
        }
    }
    out
}

/// Numbers of each row and group, `[rows, groups]`, as `[strips][groups][16]`, padded with zeros.
pub(super) fn by_strip<T: Copy + Default>(
    rows: usize,
    groups: usize,
    of: impl Fn(usize, usize) -> T,
) -> Vec<T> {
    let strips = rows.div_ceil(TILE_ROWS);
    let mut out = vec![T::default(); strips * groups * TILE_ROWS];
    for (at, to) in out.iter_mut().enumerate() {
        let (row, group) = (at / (groups * TILE_ROWS) * TILE_ROWS + at % TILE_ROWS, at / TILE_ROWS % groups);
        if row < rows {
            *to = of(row, group);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, clippy::unwrap_used)]
    use super::*;
    use crate::cpu::Elements;
    use crate::cpu::abq::Zero;

    /// Row and first column in its tile of a lane's pair.
    fn origin(lane: usize, pair: usize) -> (usize, usize) {
        let (h, p, j, r) = (pair / 8, pair / 4 % 2, pair / 2 % 2, pair % 2);
        (lane / 4 + 8 * r, 32 * h + lane % 4 * 8 + 4 * p + 2 * j)
    }

    #[test]
    fn every_bit_of_every_code_has_a_place_of_its_own() {
        for bits in 1..=8 {
            let mut taken = vec![[false; 32]; bits];
            for pair in 0..16 {
                for bit in 0..bits {
                    let (word, at) = place(bits, pair, bit);
                    assert!(at < 16);
                    for at in [at, at + 16] {
                        assert!(!std::mem::replace(&mut taken[word][at], true), "{bits} {pair} {bit}");
                    }
                }
            }
            let mut places: Vec<usize> =
                (0..LANES).flat_map(|lane| (0..bits).map(move |word| word_place(bits, lane, word))).collect();
            places.sort_unstable();
            assert!(places.iter().enumerate().all(|(i, place)| *place == 4 * i), "{bits}");
        }
    }

    #[test]
    fn tiles_hold_the_codes_of_each_lane() {
        for bits in 1..=8usize {
            let (rows, cols) = (21usize, 100usize);
            let words = cols.div_ceil(32);
            let code = |n: usize, k: usize| (n * 37 + k * 101 + n * k) & ((1 << bits) - 1);
            let mut planes = vec![0u32; bits * rows * words];
            for n in 0..rows {
                for k in 0..cols {
                    for plane in 0..bits {
                        planes[(plane * rows + n) * words + k / 32] |=
                            ((code(n, k) >> plane & 1) as u32) << (k % 32);
                    }
                }
            }
            let scale = vec![1.0; rows];
            let tiles = tiles(&Stored {
                rows,
                cols,
                bits: bits as u8,
                planes: bits as u8,
                group_size: None,
                activation_bits: None,
                words: &planes,
                scale: Elements::F32(&scale),
                zero: Zero::Symmetric,
            });
            for (at, tile) in tiles.chunks(tile_bytes(bits)).enumerate() {
                for lane in 0..LANES {
                    for pair in 0..16 {
                        let (row, k) = origin(lane, pair);
                        let (row, k) = (at / 2 * 16 + row, at % 2 * 64 + k);
                        for second in 0..2 {
                            let found = (0..bits).fold(0, |code, bit| {
                                let (word, bit_at) = place(bits, pair, bit);
                                let bytes = &tile[word_place(bits, lane, word)..][..4];
                                let word = u32::from_le_bytes(bytes.try_into().unwrap());
                                code | (word >> (bit_at + 16 * second) & 1) << bit
                            });
                            let k = k + second;
                            let expected = if row < rows && k < cols { code(row, k) } else { 0 };
                            assert_eq!(found as usize, expected, "{bits} bits, {row}, {k}");
                        }
                    }
                }
            }
        }
    }
}
