//! The product of a single token with weights of which two of four are kept, whose values stay in their twelve bits.
//!
//! ```text
//! tile of 16 x 64 values:  sign_mantissa + codes --> values of 128 columns, escapes patched --> spread by positions
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use llmpress_entropy::Error;
use llmpress_entropy::fixed12::{StripsRef, TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

use crate::cpu::dot::fixed12::{BadEscapes, Tiles, plain};
use crate::cpu::dot::{LANES, fold};
use crate::cpu::isa::Isa;
use crate::cpu::sparse24::{KEPT, QUAD};

/// Columns whose kept values a tile holds.
const TILE_SPAN: usize = 2 * TILE_COLS;
/// Columns of a byte of positions.
const BYTE_COLUMNS: usize = 2 * QUAD;

/// What is wrong with a stored matrix.
#[derive(Debug, thiserror::Error)]
pub enum SparseFault {
    /// The values.
    #[error(transparent)]
    Values(#[from] Error),
    /// A nibble's positions have no order, or bits are set past the last quad.
    #[error("a quad whose first kept value does not lie before its second")]
    Positions,
    /// The positions have another size than the rows and columns ask for.
    #[error("{found} bytes of positions for {rows} rows of {cols} columns")]
    Size {
        /// Bytes of positions.
        found: usize,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// What a path found to be wrong.
enum Bad {
    Positions,
    Escapes(BadEscapes),
}

impl From<BadEscapes> for Bad {
    fn from(bad: BadEscapes) -> Self {
        Self::Escapes(bad)
    }
}

/// [`super::super::dot_rows`] of `out.len()` rows of `x.len()` weights, to the bit: two of four are kept, at `positions`
/// (`[rows, ceil(cols / 8)]`), and their values are stored as fixed12 strips of a matrix of half as many columns. No weight is
/// written to memory. `out` ends with the matrix or with a strip.
///
/// On an error the content of `out` is unspecified.
///
/// # Errors
/// Sizes that do not fit; escapes as for [`super::super::dot_fixed12`]; positions that are not two a quad.
pub fn dot_sparse_fixed12(
    base: i16,
    strips: &StripsRef<'_>,
    positions: &[u8],
    x: &[f32],
    out: &mut [f32],
) -> Result<(), SparseFault> {
    dot_sparse_fixed12_with(Isa::detect(), base, strips, positions, x, out)
}

fn dot_sparse_fixed12_with(
    isa: Isa,
    base: i16,
    strips: &StripsRef<'_>,
    positions: &[u8],
    x: &[f32],
    out: &mut [f32],
) -> Result<(), SparseFault> {
    let (rows, cols) = (out.len(), x.len());
    let of_row = cols.div_ceil(BYTE_COLUMNS);
    if !cols.is_multiple_of(QUAD) || rows.checked_mul(of_row) != Some(positions.len()) {
        return Err(SparseFault::Size { found: positions.len(), rows, cols });
    }
    let tiles = Tiles::new(base, strips, cols / 2, rows)?;
    if x.is_empty() {
        out.fill(0.0);
        return Ok(());
    }
    #[allow(unsafe_code)]
    let done = match isa {
        // SAFETY: the features were detected, and the sizes checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot(&tiles, positions, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot(&tiles, positions, x, out) },
        Isa::Portable => dot_with(
            &tiles,
            positions,
            x,
            out,
            |bytes, codes, values| plain::decode(tiles.base, bytes, codes, values),
            add,
        ),
    };
    done.map_err(|bad| match bad {
        Bad::Positions => SparseFault::Positions,
        Bad::Escapes(BadEscapes { tile }) => tiles.describe(tile).into(),
    })
}

/// The product over all strips: `decode` makes a tile's values as if nothing were an escape, `add` adds those of a row at its
/// positions to sums.
#[inline(always)]
fn dot_with(
    tiles: &Tiles<'_>,
    positions: &[u8],
    x: &[f32],
    out: &mut [f32],
    decode: impl Fn(&[u8; TILE_WEIGHTS], &[u8; TILE_CODE_BYTES], &mut [[f32; TILE_COLS]; TILE_ROWS]),
    add: impl Fn(&[f32; TILE_COLS], &[u8], &[f32], &mut [f32; LANES]),
) -> Result<(), Bad> {
    let of_row = x.len().div_ceil(BYTE_COLUMNS);
    let mut values = [[0.0f32; TILE_COLS]; TILE_ROWS];
    let mut tile = 0;
    for (out, positions) in out.chunks_mut(TILE_ROWS).zip(positions.chunks(TILE_ROWS * of_row)) {
        if !positions.chunks_exact(of_row).all(|row| are_right(row, x.len())) {
            return Err(Bad::Positions);
        }
        let mut sums = [[0.0f32; LANES]; TILE_ROWS];
        for (across, x) in x.chunks(TILE_SPAN).enumerate() {
            decode(&tiles.sign_mantissa[tile], &tiles.codes[tile], &mut values);
            plain::patch(tiles, tile, &mut values)?;
            let first = across * TILE_SPAN / BYTE_COLUMNS;
            for ((sums, values), row) in sums.iter_mut().zip(&values).zip(positions.chunks_exact(of_row)) {
                add(values, &row[first..], x, sums);
            }
            tile += 1;
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            *out = fold(sums);
        }
    }
    Ok(())
}

/// Whether a row of positions has two a quad, and nothing past the last.
fn are_right(positions: &[u8], cols: usize) -> bool {
    let quads = cols / QUAD;
    let nibble = |quad: usize| positions[quad / 2] >> (4 * (quad % 2)) & 15;
    (0..quads).all(|quad| KEPT[usize::from(nibble(quad))] != 0)
        && (quads.is_multiple_of(2) || nibble(quads) == 0)
}

/// Adds up to 128 columns of a row.
fn add(values: &[f32; TILE_COLS], positions: &[u8], x: &[f32], sums: &mut [f32; LANES]) {
    let mut next = 0;
    for (i, (x, byte)) in x.chunks(BYTE_COLUMNS).zip(positions).enumerate() {
        let kept = KEPT[usize::from(byte & 15)] | KEPT[usize::from(byte >> 4)] << QUAD;
        for (j, x) in x.iter().enumerate() {
            let mut weight = 0.0;
            if kept >> j & 1 == 1 {
                weight = values[next];
                next += 1;
            }
            let sum = &mut sums[(BYTE_COLUMNS * i + j) % LANES];
            *sum = weight.mul_add(*x, *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use llmpress_entropy::fixed12::{Strips, encode_strips};
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::Elements;
    use crate::cpu::dot::dot_rows;
    use crate::cpu::sparse24::Sparse24;
    use crate::cpu::sparse24::tests::positions;
    use crate::cpu::test_values::{same_bits, values};

    /// Words with exponents around the window, so that some cases are full of escapes and others have none.
    fn words(seed: u64, count: usize, base: i16, spread: u64) -> Vec<u16> {
        let word = |(i, w): (usize, &f32)| {
            let i = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let exponent = (base as u64 + (i >> 32) % spread).min(255);
            (w.to_bits() >> 16) as u16 & 0x807f | (exponent as u16) << 7
        };
        values(seed, count).iter().enumerate().map(word).collect()
    }

    struct Encoded {
        strips: Strips,
        offsets: Vec<u32>,
    }

    impl Encoded {
        fn new(base: i16, cols: usize, words: &[u16]) -> Self {
            let mut strips = Strips::default();
            encode_strips(base, cols, words, &mut strips).unwrap();
            let mut offsets = vec![9u32];
            offsets.extend(strips.escape_counts.iter().scan(9, |sum, n| {
                *sum += n;
                Some(*sum)
            }));
            Self { strips, offsets }
        }

        fn view(&self) -> StripsRef<'_> {
            StripsRef {
                sign_mantissa: &self.strips.sign_mantissa,
                codes: &self.strips.codes,
                escape_offsets: &self.offsets,
                escape_positions: &self.strips.escape_positions,
                escape_exponents: &self.strips.escape_exponents,
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn the_product_with_fixed12_values_is_that_of_the_dense_weights(
            rows in 0usize..40, quads in 0usize..200, base in 0i16..=239, spread in 1u64..60, seed: u64,
        ) {
            let cols = 4 * quads;
            let words = words(seed, rows * cols / 2, base, spread);
            let encoded = Encoded::new(base, cols / 2, &words);
            let (x, positions) = (values(seed ^ 1, cols), positions(seed ^ 2, rows, cols));
            let sparse = Sparse24::new(Elements::Bf16(&words), &positions, rows, cols).unwrap();
            let mut dense = vec![f32::NAN; rows * cols];
            sparse.widen(&mut dense).unwrap();
            let mut expected = vec![f32::NAN; rows];
            dot_rows(Elements::F32(&dense), cols, &x, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows];
                dot_sparse_fixed12_with(isa, base, &encoded.view(), &positions, &x, &mut out).unwrap();
                prop_assert!(same_bits(&out, &expected), "{:?} {:?} {:?}", isa, out, expected);
            }
        }

        #[test]
        fn positions_and_escapes_that_are_wrong_are_found(
            rows in 1usize..40, quads in 1usize..200, at: prop::sample::Index, bad in 0u8..16, position in 0u16..1100, seed: u64,
        ) {
            let cols = 4 * quads;
            let words = words(seed, rows * cols / 2, 110, 30);
            let mut encoded = Encoded::new(110, cols / 2, &words);
            let (x, mut positions) = (values(seed ^ 1, cols), positions(seed ^ 2, rows, cols));
            let good = positions.clone();
            let byte = at.get_mut(&mut positions);
            *byte = *byte & 0xf0 | bad;
            for isa in Isa::available() {
                let done = dot_sparse_fixed12_with(isa, 110, &encoded.view(), &positions, &x, &mut vec![0.0; rows]);
                let right = KEPT[usize::from(bad)] != 0;
                prop_assert_eq!(matches!(done, Err(SparseFault::Positions)), !right, "{:?}", isa);
            }
            if !encoded.strips.escape_positions.is_empty() {
                *at.get_mut(&mut encoded.strips.escape_positions) = position;
                let expected = plain_result(&encoded, &good, &x, rows);
                for isa in Isa::available() {
                    let done = dot_sparse_fixed12_with(isa, 110, &encoded.view(), &good, &x, &mut vec![0.0; rows]);
                    prop_assert_eq!(done.is_ok(), expected, "{:?}", isa);
                }
                prop_assert!(position < 1024 || !expected);
            }
        }
    }

    fn plain_result(encoded: &Encoded, positions: &[u8], x: &[f32], rows: usize) -> bool {
        let mut out = vec![0.0; rows];
        dot_sparse_fixed12_with(Isa::Portable, 110, &encoded.view(), positions, x, &mut out).is_ok()
    }

    #[test]
    fn components_of_wrong_sizes_are_refused() {
        let words = words(1, 4 * 8, 110, 9);
        let encoded = Encoded::new(110, 8, &words);
        let of = |positions: &[u8], cols: usize, rows: usize| {
            dot_sparse_fixed12(110, &encoded.view(), positions, &vec![0.0; cols], &mut vec![0.0; rows])
        };
        assert!(of(&[0x44; 8], 16, 4).is_ok());
        assert!(matches!(of(&[0x44; 7], 16, 4), Err(SparseFault::Size { .. })));
        assert!(matches!(of(&[0x44; 8], 14, 4), Err(SparseFault::Size { .. })));
        assert!(matches!(of(&[0x44; 34], 16, 17), Err(SparseFault::Values(_))));
    }
}
