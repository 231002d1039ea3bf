//! The product of a single token with weights that stay in their twelve bits.
//!
//! ```text
//! tile of 16 x 64:  sign_mantissa + codes --> single precision, escapes patched --> 16 rows of 64 sums
//! ```

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod plain;

use llmpress_entropy::Error;
use llmpress_entropy::fixed12::{
    MAX_BASE, MIN_BASE, StripsRef, TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS,
};

use super::fold;
use crate::cpu::isa::Isa;

/// [`super::dot_rows`] of `out.len()` rows of `x.len()` weights that are stored as fixed12 strips: the same bits
/// as decoding them to bfloat16 first, but only the twelve bits of each weight are read and no weight is
/// written to memory. `out` ends with the matrix or with a strip: rows past it are padding.
///
/// On an error the content of `out` is unspecified.
///
/// # Errors
/// [`Error::Corrupt`] where the sizes of the components do not fit, or the escapes of a tile are not ascending
/// positions of its weights. What [`llmpress_entropy::fixed12::decode_strips`] checks beyond that is left to
/// it: padding is ignored, and so is whether an escape needs to be one. Of an escape whose code is not 0 the
/// weight is unspecified.
pub fn dot_fixed12(base: i16, strips: &StripsRef<'_>, x: &[f32], out: &mut [f32]) -> Result<(), Error> {
    dot_fixed12_with(Isa::detect(), base, strips, x, out)
}

fn dot_fixed12_with(
    isa: Isa,
    base: i16,
    strips: &StripsRef<'_>,
    x: &[f32],
    out: &mut [f32],
) -> Result<(), Error> {
    let tiles = Tiles::new(base, strips, x.len(), out.len())?;
    if x.is_empty() {
        out.fill(0.0);
        return Ok(());
    }
    #[allow(unsafe_code)]
    let done = match isa {
        // SAFETY: the features were detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot(&tiles, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot(&tiles, x, out) },
        Isa::Portable => plain::dot(&tiles, x, out),
    };
    done.map_err(|BadEscapes { tile }| tiles.describe(tile))
}

/// A tile's escapes are not ascending positions of its weights.
pub(super) struct BadEscapes {
    pub(super) tile: usize,
}

/// Strips whose components have the right sizes.
pub(super) struct Tiles<'a> {
    pub(super) base: u32,
    rows: usize,
    cols: usize,
    across: usize,
    pub(super) sign_mantissa: &'a [[u8; TILE_WEIGHTS]],
    pub(super) codes: &'a [[u8; TILE_CODE_BYTES]],
    offsets: &'a [u32],
    positions: &'a [u16],
    exponents: &'a [u8],
}

impl<'a> Tiles<'a> {
    pub(super) fn new(base: i16, strips: &StripsRef<'a>, cols: usize, rows: usize) -> Result<Self, Error> {
        let wrong = |component, what: String| Err(Error::Corrupt { component, what });
        if !(MIN_BASE..=MAX_BASE).contains(&base) {
            return wrong("base", format!("{base} is not in {MIN_BASE}..={MAX_BASE}"));
        }
        let across = cols.div_ceil(TILE_COLS);
        let tiles = across.checked_mul(rows.div_ceil(TILE_ROWS));
        for (component, found, right) in [
            ("sign_mantissa", strips.sign_mantissa.len(), tiles.and_then(|n| n.checked_mul(TILE_WEIGHTS))),
            ("codes", strips.codes.len(), tiles.and_then(|n| n.checked_mul(TILE_CODE_BYTES))),
            ("escape_offsets", strips.escape_offsets.len(), tiles.and_then(|n| n.checked_add(1))),
        ] {
            if right != Some(found) {
                return wrong(component, format!("{found} entries for {rows} rows of {cols}"));
            }
        }
        if !strips.escape_offsets.is_sorted() {
            return wrong("escape_offsets", "not ascending".to_owned());
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
                return wrong(component, format!("{found} entries for {escapes} escapes"));
            }
        }
        Ok(Self {
            base: u32::from(base.unsigned_abs()),
            rows,
            cols,
            across,
            sign_mantissa: strips.sign_mantissa.as_chunks().0,
            codes: strips.codes.as_chunks().0,
            offsets: strips.escape_offsets,
            positions: strips.escape_positions,
            exponents: strips.escape_exponents,
        })
    }

    /// Positions and exponents of a tile's escapes; none past the last tile.
    #[inline]
    pub(super) fn escapes(&self, tile: usize) -> (&'a [u16], &'a [u8]) {
        let at = |tile: usize| self.offsets.get(tile).map(|offset| (offset - self.offsets[0]) as usize);
        match (at(tile), at(tile + 1)) {
            (Some(first), Some(end)) => (&self.positions[first..end], &self.exponents[first..end]),
            _ => (&[], &[]),
        }
    }

    /// Rows and columns of a tile that are no padding.
    #[inline]
    fn extent(&self, tile: usize) -> (usize, usize) {
        let (strip, across) = (tile / self.across, tile % self.across);
        ((self.rows - strip * TILE_ROWS).min(TILE_ROWS), (self.cols - across * TILE_COLS).min(TILE_COLS))
    }

    /// What is wrong with the escapes of `tile`.
    #[cold]
    pub(super) fn describe(&self, tile: usize) -> Error {
        let (rows, cols) = self.extent(tile);
        let mut next = 0;
        for &position in self.escapes(tile).0 {
            let position = usize::from(position);
            let what = if position >= TILE_WEIGHTS {
                "does not exist"
            } else if position < next {
                "is out of order"
            } else if position / TILE_COLS >= rows || position % TILE_COLS >= cols {
                "is padding"
            } else {
                next = position + 1;
                continue;
            };
            return Error::Corrupt {
                component: "escape_positions",
                what: format!("{position} in tile {tile} {what}"),
            };
        }
        Error::Corrupt { component: "escape_positions", what: format!("tile {tile}") }
    }
}

#[cfg(test)]
mod tests {
    use llmpress_entropy::fixed12::{Strips, decode_strips, encode_strips};
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::Elements;
    use crate::cpu::dot::reference;
    use crate::cpu::test_values::{same_bits, values};

    fn offsets(strips: &Strips) -> Vec<u32> {
        let mut offsets = vec![9u32];
        offsets.extend(strips.escape_counts.iter().scan(9, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        offsets
    }

    fn view<'a>(strips: &'a Strips, offsets: &'a [u32]) -> StripsRef<'a> {
        StripsRef {
            sign_mantissa: &strips.sign_mantissa,
            codes: &strips.codes,
            escape_offsets: offsets,
            escape_positions: &strips.escape_positions,
            escape_exponents: &strips.escape_exponents,
        }
    }

    /// Words with exponents around the window, so that some cases are full of escapes and others have none.
    fn words(seed: u64, count: usize, base: i16, spread: u64) -> Vec<u16> {
        values(seed, count)
            .iter()
            .enumerate()
            .map(|(i, w)| {
                let i = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let exponent = (base as u64 + (i >> 32) % spread).min(255);
                (w.to_bits() >> 16) as u16 & 0x807f | (exponent as u16) << 7
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn fixed12_gives_the_bits_of_bf16(
            rows in 0usize..40, cols in 0usize..300, base in 0i16..=239, spread in 1u64..60, seed: u64,
        ) {
            let words = words(seed, rows * cols, base, spread);
            let mut encoded = Strips::default();
            encode_strips(base, cols, &words, &mut encoded).unwrap();
            let offsets = offsets(&encoded);
            let strips = view(&encoded, &offsets);
            let x = values(seed ^ 1, cols);
            let mut decoded = vec![0; rows * cols];
            decode_strips(base, cols, rows, &strips, &mut decoded).unwrap();
            prop_assert_eq!(&decoded, &words);
            let mut expected = vec![f32::NAN; rows];
            reference(Elements::Bf16(&words), cols, &x, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows];
                dot_fixed12_with(isa, base, &strips, &x, &mut out).unwrap();
                prop_assert!(same_bits(&out, &expected), "{isa:?} {out:?} {expected:?}");
            }
        }

        /// Whatever is done to the list of escapes, it is refused if `decode_strips` refuses its positions.
        #[test]
        fn bad_lists_of_escapes_are_refused(
            rows in 1usize..40, cols in 1usize..200, spread in 17u64..60, seed: u64,
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0u16..1100), 1..4),
        ) {
            let base = 110;
            let words = words(seed, rows * cols, base, spread);
            let mut encoded = Strips::default();
            encode_strips(base, cols, &words, &mut encoded).unwrap();
            let offsets = offsets(&encoded);
            if encoded.escape_positions.is_empty() {
                return Ok(());
            }
            for (at, position) in changes {
                *at.get_mut(&mut encoded.escape_positions) = position;
            }
            let strips = view(&encoded, &offsets);
            let x = values(seed ^ 1, cols);
            let mut decoded = vec![0; rows * cols];
            let refused = matches!(
                decode_strips(base, cols, rows, &strips, &mut decoded),
                Err(Error::Corrupt { component: "escape_positions", .. })
            );
            for isa in Isa::available() {
                let result = dot_fixed12_with(isa, base, &strips, &x, &mut vec![0.0; rows]);
                // Positions that are right may still belong to weights that have codes, which stops decoding first.
                let positions_are_wrong = matches!(result, Err(Error::Corrupt { component: "escape_positions", .. }));
                prop_assert!(positions_are_wrong || !refused, "{isa:?} {result:?}");
                prop_assert_eq!(positions_are_wrong, !tiles_ascend(&strips, rows, cols), "{:?}", isa);
            }
        }

        #[test]
        fn components_of_wrong_sizes_are_refused(rows in 1usize..40, cols in 1usize..200, seed: u64) {
            let words = words(seed, rows * cols, 110, 20);
            let mut encoded = Strips::default();
            encode_strips(110, cols, &words, &mut encoded).unwrap();
            let offsets = offsets(&encoded);
            let good = view(&encoded, &offsets);
            fn shorter<T>(all: &[T]) -> &[T] {
                &all[..all.len().saturating_sub(1)]
            }
            let mut falling = offsets.clone();
            *falling.last_mut().unwrap() = 8;
            let mut bad = vec![
                StripsRef { sign_mantissa: shorter(good.sign_mantissa), ..good },
                StripsRef { codes: shorter(good.codes), ..good },
                StripsRef { escape_offsets: shorter(good.escape_offsets), ..good },
                StripsRef { escape_offsets: &falling, ..good },
            ];
            if !good.escape_positions.is_empty() {
                bad.push(StripsRef { escape_positions: shorter(good.escape_positions), ..good });
                bad.push(StripsRef { escape_exponents: shorter(good.escape_exponents), ..good });
            }
            let x = values(seed, cols);
            for strips in bad {
                prop_assert!(dot_fixed12(110, &strips, &x, &mut vec![0.0; rows]).is_err());
            }
            for base in [-1, 240] {
                prop_assert!(dot_fixed12(base, &good, &x, &mut vec![0.0; rows]).is_err());
            }
        }
    }

    /// Whether the escapes of every tile are ascending positions of weights.
    fn tiles_ascend(strips: &StripsRef<'_>, rows: usize, cols: usize) -> bool {
        let across = cols.div_ceil(TILE_COLS);
        let ends = strips.escape_offsets.windows(2).map(|w| (w[0] - 9) as usize..(w[1] - 9) as usize);
        ends.enumerate().all(|(tile, range)| {
            let positions = &strips.escape_positions[range];
            let inside = |p: &u16| {
                let (row, col) = (usize::from(p / 64), usize::from(p % 64));
                *p < 1024 && tile / across * 16 + row < rows && tile % across * 64 + col < cols
            };
            positions.iter().all(inside) && positions.is_sorted_by(|a, b| a < b)
        })
    }
}
