//! Runs of whole strips: edges, escapes and the choice of tile coder.

use super::{
    MAX_BASE, MIN_BASE, Strips, StripsRef, TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS, escapes,
    padding_word, portable,
};
use crate::Error;

/// Encodes whole rows, any number of them, as strips: a matrix at once, or a run of its strips. Only the
/// matrix's last strip may have fewer than 16 rows; the rest of it becomes padding.
///
/// `out` is overwritten; its buffers keep their memory.
///
/// # Errors
/// [`Error::Invalid`] where `base` is not in [`MIN_BASE`]`..=`[`MAX_BASE`] or `words` is no whole number of
/// rows of `cols`.
pub fn encode_strips(base: i16, cols: usize, words: &[u16], out: &mut Strips) -> Result<(), Error> {
    encode_strips_with(Tiles::detect(), base, cols, words, out)
}

/// Decodes a run of whole strips into the `rows` x `cols` weights that they hold, from the first
/// strip's first row on. `rows` is what these strips have of the matrix: rows of the last strip past it are
/// padding.
///
/// On an error the content of `out` is unspecified.
///
/// # Errors
/// [`Error::Corrupt`] where the strips break the format, non-zero padding and escapes that need none
/// included. [`Error::Invalid`] where `out` is not `rows * cols` long.
pub fn decode_strips(
    base: i16,
    cols: usize,
    rows: usize,
    strips: &StripsRef<'_>,
    out: &mut [u16],
) -> Result<(), Error> {
    decode_strips_with(Tiles::detect(), base, cols, rows, strips, out)
}

/// The coder of one tile. Words are addressed by the tile's first word and the distance of its rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tiles {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(super::avx2::Avx2),
}

impl Tiles {
    /// The fastest that this processor runs.
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = super::avx2::Avx2::detect() {
            return Self::Avx2(avx2);
        }
        Self::Portable
    }

    fn encode(
        self,
        base: u16,
        words: &[u16],
        stride: usize,
        sign_mantissa: &mut [u8; TILE_WEIGHTS],
        codes: &mut [u8; TILE_CODE_BYTES],
    ) -> [u64; TILE_ROWS] {
        match self {
            Self::Portable => portable::encode_tile(base, words, stride, sign_mantissa, codes),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.encode_tile(base, words, stride, sign_mantissa, codes),
        }
    }

    fn decode(
        self,
        base: u16,
        sign_mantissa: &[u8; TILE_WEIGHTS],
        codes: &[u8; TILE_CODE_BYTES],
        words: &mut [u16],
        stride: usize,
    ) {
        match self {
            Self::Portable => portable::decode_tile(base, sign_mantissa, codes, words, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.decode_tile(base, sign_mantissa, codes, words, stride),
        }
    }
}

/// How the tiles of a run of strips lie over its words, arguments checked.
pub(super) struct Layout {
    rows: usize,
    cols: usize,
    tiles_across: usize,
    strips: usize,
}

impl Layout {
    /// Of rows to encode.
    pub(super) fn of_words(base: i16, cols: usize, words: usize) -> Result<Self, Error> {
        if !(MIN_BASE..=MAX_BASE).contains(&base) {
            return Err(Error::Invalid(format!("base {base} is not in {MIN_BASE}..={MAX_BASE}")));
        }
        let rows = match words.checked_rem(cols) {
            Some(0) => words / cols,
            None if words == 0 => 0,
            _ => return Err(Error::Invalid(format!("{words} words are no whole rows of {cols}"))),
        };
        Ok(Self::new(rows, cols))
    }

    /// Of encoded strips. Afterwards every component has the length that its tiles need, and the offsets
    /// ascend from the first to the last escape.
    pub(super) fn of_strips(
        base: i16,
        cols: usize,
        rows: usize,
        strips: &StripsRef<'_>,
        words: usize,
    ) -> Result<Self, Error> {
        if rows.checked_mul(cols) != Some(words) {
            return Err(Error::Invalid(format!("{rows} rows of {cols} do not fill {words} words")));
        }
        if !(MIN_BASE..=MAX_BASE).contains(&base) {
            return Err(Error::corrupt("base", format!("{base} is not in {MIN_BASE}..={MAX_BASE}")));
        }
        let layout = Self::new(rows, cols);
        let tiles = layout.tiles();
        let length = |component, found: usize, right: Option<usize>| match right {
            Some(right) if right == found => Ok(()),
            _ => Err(Error::corrupt(component, format!("{found} entries for {tiles} tiles"))),
        };
        length("sign_mantissa", strips.sign_mantissa.len(), tiles.checked_mul(TILE_WEIGHTS))?;
        length("codes", strips.codes.len(), tiles.checked_mul(TILE_CODE_BYTES))?;
        length("escape_offsets", strips.escape_offsets.len(), tiles.checked_add(1))?;
        if !strips.escape_offsets.is_sorted() {
            return Err(Error::corrupt("escape_offsets", "not ascending"));
        }
        let escapes = match strips.escape_offsets {
            [first, .., last] => (last - first) as usize,
            _ => 0,
        };
        for (component, found) in [
            ("escape_positions", strips.escape_positions.len()),
            ("escape_exponents", strips.escape_exponents.len()),
        ] {
            if found != escapes {
                return Err(Error::corrupt(component, format!("{found} entries for {escapes} escapes")));
            }
        }
        Ok(layout)
    }

    fn new(rows: usize, cols: usize) -> Self {
        // Of no columns there are no tiles, however many rows.
        let strips = if cols == 0 { 0 } else { rows.div_ceil(TILE_ROWS) };
        Self { rows, cols, tiles_across: cols.div_ceil(TILE_COLS), strips }
    }

    /// Tiles in all. They cover words that are in memory, at most 1,024 words each for one: no overflow.
    pub(super) fn tiles(&self) -> usize {
        self.strips.saturating_mul(self.tiles_across)
    }

    /// Where the weight at (`row`, `col`) of `tile` lies among the words; `None` for padding.
    pub(super) fn index(&self, tile: usize, row: usize, col: usize) -> Option<usize> {
        let row = tile / self.tiles_across * TILE_ROWS + row;
        let col = tile % self.tiles_across * TILE_COLS + col;
        (row < self.rows && col < self.cols).then(|| row * self.cols + col)
    }

    /// The tiles in order.
    fn placements(&self) -> impl Iterator<Item = Placement> + '_ {
        (0..self.strips).flat_map(move |strip| {
            (0..self.tiles_across).map(move |across| {
                let (row, col) = (strip * TILE_ROWS, across * TILE_COLS);
                Placement {
                    first: row * self.cols + col,
                    rows: (self.rows - row).min(TILE_ROWS),
                    cols: (self.cols - col).min(TILE_COLS),
                }
            })
        })
    }
}

/// A tile over the words: where it starts and how much of it is no padding.
struct Placement {
    first: usize,
    rows: usize,
    cols: usize,
}

impl Placement {
    fn is_whole(&self) -> bool {
        self.rows == TILE_ROWS && self.cols == TILE_COLS
    }
}

pub(super) fn encode_strips_with(
    coder: Tiles,
    base: i16,
    cols: usize,
    words: &[u16],
    out: &mut Strips,
) -> Result<(), Error> {
    let layout = Layout::of_words(base, cols, words.len())?;
    let base = base.unsigned_abs();
    // Every byte is written below: what a reused buffer holds need not be cleared first.
    out.sign_mantissa.resize(layout.tiles() * TILE_WEIGHTS, 0);
    out.codes.resize(layout.tiles() * TILE_CODE_BYTES, 0);
    out.escape_counts.clear();
    out.escape_positions.clear();
    out.escape_exponents.clear();
    let (sign_mantissa, _) = out.sign_mantissa.as_chunks_mut::<TILE_WEIGHTS>();
    let (codes, _) = out.codes.as_chunks_mut::<TILE_CODE_BYTES>();
    let mut edge;
    for ((tile, sign_mantissa), codes) in layout.placements().zip(sign_mantissa).zip(codes) {
        let (words, stride) = if tile.is_whole() {
            (&words[tile.first..], cols)
        } else {
            edge = [padding_word(base); TILE_WEIGHTS];
            for (row, to) in edge.chunks_exact_mut(TILE_COLS).take(tile.rows).enumerate() {
                to[..tile.cols].copy_from_slice(&words[tile.first + row * cols..][..tile.cols]);
            }
            (&edge[..], TILE_COLS)
        };
        let masks = coder.encode(base, words, stride, sign_mantissa, codes);
        let before = out.escape_positions.len();
        escapes::list(&masks, words, stride, &mut out.escape_positions, &mut out.escape_exponents);
        out.escape_counts.push((out.escape_positions.len() - before) as u32);
    }
    Ok(())
}

pub(super) fn decode_strips_with(
    coder: Tiles,
    base: i16,
    cols: usize,
    rows: usize,
    strips: &StripsRef<'_>,
    out: &mut [u16],
) -> Result<(), Error> {
    let layout = Layout::of_strips(base, cols, rows, strips, out.len())?;
    let base = base.unsigned_abs();
    let (sign_mantissa, _) = strips.sign_mantissa.as_chunks::<TILE_WEIGHTS>();
    let (codes, _) = strips.codes.as_chunks::<TILE_CODE_BYTES>();
    let mut positions = strips.escape_positions;
    let mut exponents = strips.escape_exponents;
    let mut edge = [0; TILE_WEIGHTS];
    let tiles = layout.placements().zip(sign_mantissa).zip(codes).zip(strips.escape_offsets.windows(2));
    for (number, (((tile, sign_mantissa), codes), offsets)) in tiles.enumerate() {
        // `Layout::of_strips` saw the offsets ascend to as many escapes as there are.
        let escapes = (offsets[1] - offsets[0]) as usize;
        let (tile_positions, tile_exponents);
        (tile_positions, positions) = positions.split_at(escapes);
        (tile_exponents, exponents) = exponents.split_at(escapes);
        let patch = |words: &mut [u16], stride| {
            escapes::patch(
                base,
                number,
                tile_positions,
                tile_exponents,
                (tile.rows, tile.cols),
                words,
                stride,
            )
        };
        if tile.is_whole() {
            let words = &mut out[tile.first..];
            coder.decode(base, sign_mantissa, codes, words, cols);
            patch(words, cols)?;
        } else {
            coder.decode(base, sign_mantissa, codes, &mut edge, TILE_COLS);
            check_padding(base, number, &tile, &edge)?;
            patch(&mut edge, TILE_COLS)?;
            for (row, from) in edge.chunks_exact(TILE_COLS).take(tile.rows).enumerate() {
                out[tile.first + row * cols..][..tile.cols].copy_from_slice(&from[..tile.cols]);
            }
        }
    }
    Ok(())
}

/// Refuses a padded tile whose padding is not byte 0 and code 0.
fn check_padding(
    base: u16,
    number: usize,
    tile: &Placement,
    words: &[u16; TILE_WEIGHTS],
) -> Result<(), Error> {
    for (row, words) in words.chunks_exact(TILE_COLS).enumerate() {
        let padding = if row < tile.rows { &words[tile.cols..] } else { words };
        if let Some(word) = padding.iter().find(|&&word| word != padding_word(base)) {
            let byte_is_zero = word & 0x807f == 0;
            return Err(padding_error(if byte_is_zero { "codes" } else { "sign_mantissa" }, number));
        }
    }
    Ok(())
}

pub(super) fn padding_error(component: &'static str, tile: usize) -> Error {
    Error::corrupt(component, format!("padding of tile {tile} is not zero"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixed12::{decode_strips_reference, encode_strips_reference};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// The coder for processors without vectors of our own, which [`Tiles::detect`] may never pick here.
        #[test]
        fn portable_tiles_equal_the_reference(
            base in MIN_BASE..=MAX_BASE,
            (cols, words) in (1..150_usize, 0..40_usize)
                .prop_flat_map(|(cols, rows)| (Just(cols), prop::collection::vec(any::<u16>(), rows * cols))),
        ) {
            let (mut fast, mut slow) = (Strips::default(), Strips::default());
            encode_strips_with(Tiles::Portable, base, cols, &words, &mut fast).unwrap();
            encode_strips_reference(base, cols, &words, &mut slow).unwrap();
            prop_assert_eq!(&fast, &slow);
            let mut offsets = vec![7_u32];
            offsets.extend(fast.escape_counts.iter().scan(7, |sum, n| { *sum += n; Some(*sum) }));
            let strips = StripsRef {
                sign_mantissa: &fast.sign_mantissa,
                codes: &fast.codes,
                escape_offsets: &offsets,
                escape_positions: &fast.escape_positions,
                escape_exponents: &fast.escape_exponents,
            };
            let mut decoded = vec![0; words.len()];
            decode_strips_with(Tiles::Portable, base, cols, words.len() / cols, &strips, &mut decoded).unwrap();
            prop_assert_eq!(&decoded, &words);
            decode_strips_reference(base, cols, words.len() / cols, &strips, &mut decoded).unwrap();
            prop_assert_eq!(&decoded, &words);
        }
    }
}
