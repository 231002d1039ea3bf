//! Codes times single precision: codes become floats in registers, 16 rows at once.
//!
//! ```text
//! up to 4 bits:  code, less the centre, from a table of 16       more: in mantissa bits that count ones, less the rest
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::inputs::Floats;
use super::super::layout::{Line, Zeros};
use super::super::{BLOCK_COLS, Matrix, STRIP, TILE_ROWS};
use super::{AHEAD, by_planes, codes, lanes, zeros};

pub(super) fn multiply(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Floats<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    let tokens = totals.len() / tiles.len();
    macro_rules! planes {
        ($planes:literal, $apart:literal) => {
            // SAFETY: the caller detected the features and checked the tiles.
            unsafe {
                match tokens {
                    1 => run::<$planes, 4, 1>(matrix, tiles, x, totals),
                    2 => run::<$planes, 4, 2>(matrix, tiles, x, totals),
                    4 => run::<$planes, 4, 4>(matrix, tiles, x, totals),
                    8 => run::<$planes, 2, 8>(matrix, tiles, x, totals),
                    _ => run::<$planes, 1, 16>(matrix, tiles, x, totals),
                }
            }
        };
    }
    // Planes lie apart for products of integers only.
    #[allow(unsafe_code)]
    {
        by_planes!(matrix.planes, false, planes);
    }
}

/// Tiles of a strip by `T` tokens, `R` at once: a stretch of columns for each before the next one.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn run<const P: usize, const R: usize, const T: usize>(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Floats<'_>,
    out: &mut [[f32; TILE_ROWS]],
) {
    // Blocks of a stretch.
    let stretch = if R >= STRIP { usize::MAX } else { 4 };
    let count = tiles.len().min(STRIP);
    let stride = matrix.strip_tiles(tiles.start) * P;
    let strip = matrix.lines.as_ptr().wrapping_add(matrix.block(tiles.start, 0));
    let table = Table::new(P, matrix.centre());
    let mut totals = [[_mm512_setzero_ps(); T]; STRIP];
    for group in 0..matrix.groups {
        let mut sums = [[_mm512_setzero_ps(); T]; STRIP];
        let mut blocks = matrix.group_blocks(group);
        while !blocks.is_empty() {
            let some = blocks.start..blocks.end.min(blocks.start.saturating_add(stretch));
            blocks.start = some.end;
            // SAFETY: the blocks exist in each of the tiles; the inputs have T tokens for each column of them.
            unsafe {
                let lines = strip.add(some.start * stride);
                let x = x.x.as_ptr().add(some.start * T * BLOCK_COLS);
                let (together, rest) = sums[..count].as_chunks_mut::<R>();
                let mut tile = 0;
                for sums in together {
                    add::<P, R, T>(lines.add(tile * P), stride, some.len(), x, table, sums);
                    tile += R;
                }
                for sums in rest.as_chunks_mut::<1>().0 {
                    add::<P, 1, T>(lines.add(tile * P), stride, some.len(), x, table, sums);
                    tile += 1;
                }
            }
        }
        for (r, (sums, totals)) in sums.iter().zip(&mut totals).enumerate().take(count) {
            // SAFETY: the tile and the group exist.
            unsafe { add_group(matrix, tiles.start + r, group, x, sums, totals) };
        }
    }
    for (out, totals) in out.chunks_exact_mut(T).zip(totals) {
        for (out, total) in out.iter_mut().zip(totals) {
            // SAFETY: 16 rows.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
        }
    }
}

/// What turns codes into floats.
#[derive(Clone, Copy)]
struct Table {
    /// Of 16 codes, less the centre.
    values: __m512,
    centre: f32,
}

impl Table {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(planes: usize, centre: f32) -> Self {
        let mut values = [0.0f32; 16];
        for (i, value) in values.iter_mut().enumerate() {
            *value = (i % (1 << planes.min(4))) as f32 - centre;
        }
        // SAFETY: 16 values.
        #[allow(unsafe_code)]
        let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        Self { values, centre }
    }

    /// Of codes that begin at bit `at` of words, among other bits.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn weights<const P: usize>(self, words: __m512i, at: usize) -> __m512 {
        let down = |bits: usize| _mm512_srlv_epi32(words, _mm512_set1_epi32(bits as i32));
        if P <= 4 {
            return _mm512_permutexvar_ps(down(at), self.values);
        }
        let (words, at) = (down(at / 16 * 16), at % 16);
        // Of a number whose bit `at` counts ones.
        let exponent = (127 + 23 - at as u32) << 23;
        let mask = _mm512_set1_epi32(((1 << P) - 1) << at);
        // (words & mask) | exponent
        let float = _mm512_ternarylogic_epi32::<0xea>(words, mask, _mm512_set1_epi32(exponent as i32));
        let less = _mm512_set1_ps(f32::from_bits(exponent) + self.centre);
        _mm512_sub_ps(_mm512_castsi512_ps(float), less)
    }
}

/// Weights, less the centre, of a column of 16 rows.
///
/// # Safety
/// `lines` are all of a block of `P` planes.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn column<const P: usize, const COL: usize>(lines: *const Line, table: Table) -> __m512 {
    let (quad, byte) = const { (COL / 4, COL % 4) };
    // SAFETY: a field has as many lines as bits.
    unsafe {
        if matches!(P, 1 | 2 | 4) {
            let line = _mm512_load_si512(lines.add(quad * P / 8).cast());
            return table.weights::<P>(line, byte * 8 + quad * P % 8);
        }
        table.weights::<P>(codes::<P, false>(lines, quad), byte * 8)
    }
}

/// Adds the products of so many blocks, `stride` lines apart, of `R` neighbouring tiles.
///
/// # Safety
/// They exist, and `x` has `T` tokens for each column.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
#[inline]
unsafe fn add<const P: usize, const R: usize, const T: usize>(
    lines: *const Line,
    stride: usize,
    blocks: usize,
    x: *const f32,
    table: Table,
    to: &mut [[__m512; T]; R],
) {
    let mut sums = *to;
    for block in 0..blocks {
        let lines = lines.wrapping_add(block * stride);
        let x = x.wrapping_add(block * T * BLOCK_COLS);
        for line in 0..R * P {
            _mm_prefetch::<_MM_HINT_T1>(lines.wrapping_add(AHEAD * stride + line).cast());
        }
        // Written out: shifts and masks are constants.
        macro_rules! columns {
            ($($col:literal)*) => { $(
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let weights = column::<P, $col>(lines.add(r * P), table);
                        for (t, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_fmadd_ps(weights, _mm512_set1_ps(*x.add($col * T + t)), *sum);
                        }
                    }
                }
            )* };
        }
        columns!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
    }
    *to = sums;
}

/// Adds the sums of a group to the totals.
///
/// # Safety
/// The tile exists.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
#[inline]
unsafe fn add_group<const T: usize>(
    matrix: &Matrix,
    tile: usize,
    group: usize,
    x: &Floats<'_>,
    sums: &[__m512; T],
    totals: &mut [__m512; T],
) {
    let at = matrix.lanes(tile, group);
    let centre = _mm512_set1_ps(matrix.centre());
    let tokens = sums.iter().zip(totals).zip(x.sums.iter().skip(group).step_by(matrix.groups));
    // SAFETY: the lanes of this tile and group.
    unsafe {
        let scale = lanes(&matrix.scale, at);
        match &matrix.zero {
            Zeros::Symmetric => {
                for ((sum, total), _) in tokens {
                    *total = _mm512_fmadd_ps(scale, *sum, *total);
                }
            }
            Zeros::Integer(values) => {
                let from = _mm512_sub_ps(centre, _mm512_cvtepi32_ps(zeros(values, at)));
                for ((sum, total), of_inputs) in tokens {
                    let sum = _mm512_fmadd_ps(from, _mm512_set1_ps(*of_inputs), *sum);
                    *total = _mm512_fmadd_ps(scale, sum, *total);
                }
            }
            Zeros::Real(offset) => {
                let offset = _mm512_fmadd_ps(scale, centre, lanes(offset, at));
                for ((sum, total), of_inputs) in tokens {
                    *total = _mm512_fmadd_ps(scale, *sum, *total);
                    *total = _mm512_fmadd_ps(offset, _mm512_set1_ps(*of_inputs), *total);
                }
            }
        }
    }
}
