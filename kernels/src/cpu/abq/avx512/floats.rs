//! Codes times single precision: codes become floats in registers, 16 rows at once.
//!
//! ```text
//! up to 4 bits:  code, less the centre, from a table of 16       more: in the last bits of 2^23, less 2^23 and the centre
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::inputs::Floats;
use super::super::layout::{Field, Line, Zeros, fields};
use super::super::{BLOCK_COLS, Matrix, STRIP, TILE_ROWS};
use super::{FAR_AHEAD, by_planes, lanes, zeros};

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
    /// What is taken from a code in the last bits of 2^23.
    less: __m512,
}

/// The bits of 2^23, whose last bits count ones.
const INTEGER: u32 = 0x4b00_0000;

impl Table {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(planes: usize, centre: f32) -> Self {
        let mut values = [0.0f32; 16];
        for (i, value) in values.iter_mut().enumerate() {
            *value = (i % (1 << planes.min(4))) as f32 - centre;
        }
        let less = _mm512_set1_ps(f32::from_bits(INTEGER) + centre);
        // SAFETY: 16 values.
        #[allow(unsafe_code)]
        let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        Self { values, less }
    }

    /// Of codes that have other bits above them if `P` <= 4.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn weights<const P: usize>(self, codes: __m512i) -> __m512 {
        if P <= 4 {
            return _mm512_permutexvar_ps(codes, self.values);
        }
        // (codes & mask) | integer
        let mask = _mm512_set1_epi32((1 << P) - 1);
        let float = _mm512_ternarylogic_epi32::<0xea>(codes, mask, _mm512_set1_epi32(INTEGER as i32));
        _mm512_sub_ps(_mm512_castsi512_ps(float), self.less)
    }
}

/// The codes of a column of 16 rows, less the centre: in the lowest bits of words, with others above them if `P` <= 4.
///
/// # Safety
/// `lines` are all of a block of `P` planes.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn column<const P: usize>(lines: *const Line, column: usize) -> __m512i {
    let (fields, count): ([Field; 8], usize) = const { fields(P, false) };
    let mut codes = _mm512_setzero_si512();
    let mut i = 0;
    while i < count {
        let Field { bits, offset } = fields[i];
        let at = column / 4 * bits;
        let shift = column % 4 * 8 + at % 8;
        // SAFETY: a field has as many lines as bits.
        let line = unsafe { _mm512_load_si512(lines.add(offset + at / 8).cast()) };
        let turned = if shift >= offset {
            _mm512_srlv_epi32(line, _mm512_set1_epi32((shift - offset) as i32))
        } else {
            _mm512_sllv_epi32(line, _mm512_set1_epi32((offset - shift) as i32))
        };
        if i == 0 {
            codes = turned;
        } else {
            // Bits from `offset` on from this field, those below from the ones before.
            let below = _mm512_set1_epi32((1 << offset) - 1);
            codes = _mm512_ternarylogic_epi32::<0xca>(below, codes, turned);
        }
        i += 1;
    }
    codes
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
            _mm_prefetch::<_MM_HINT_T1>(lines.wrapping_add(FAR_AHEAD * stride + line).cast());
        }
        for col in 0..BLOCK_COLS {
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let weights = table.weights::<P>(column::<P>(lines.add(r * P), col));
                    for (t, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_fmadd_ps(weights, _mm512_set1_ps(*x.add(col * T + t)), *sum);
                    }
                }
            }
        }
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
