//! Codes times codes by VNNI: 64 products an instruction, four to each row's sum.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::inputs::Integers;
use super::super::layout::Line;
use super::super::{BLOCK_COLS, Matrix, STRIP, TILE_ROWS};
use super::{AHEAD, add_group, by_planes, code_sums, codes};

pub(super) fn multiply(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Integers<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    macro_rules! planes {
        ($planes:literal, $apart:literal) => {
            // SAFETY: the caller detected the features and checked the tiles.
            unsafe {
                match x.steps.len() {
                    1 => run::<$planes, $apart, 4, 1>(matrix, tiles, x, totals),
                    2 => run::<$planes, $apart, 4, 2>(matrix, tiles, x, totals),
                    4 => run::<$planes, $apart, 4, 4>(matrix, tiles, x, totals),
                    8 => run::<$planes, $apart, 2, 8>(matrix, tiles, x, totals),
                    _ => run::<$planes, $apart, 1, 16>(matrix, tiles, x, totals),
                }
            }
        };
    }
    #[allow(unsafe_code)]
    {
        by_planes!(matrix.planes, matrix.apart, planes);
    }
}

/// Tiles of a strip by `T` tokens, `R` at once: a stretch of columns for each before the next one, so that memory is read in order and the
/// activations stay near.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn run<const P: usize, const APART: bool, const R: usize, const T: usize>(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Integers<'_>,
    out: &mut [[f32; TILE_ROWS]],
) {
    // Blocks of a stretch.
    let stretch = if R >= STRIP { usize::MAX } else { 8 };
    let count = tiles.len().min(STRIP);
    let stride = matrix.strip_tiles(tiles.start) * P;
    let strip = matrix.lines.as_ptr().wrapping_add(matrix.block(tiles.start, 0));
    let mut totals = [[_mm512_setzero_ps(); T]; STRIP];
    for group in 0..matrix.groups {
        let mut sums = [[_mm512_setzero_si512(); T]; STRIP];
        for (r, sums) in sums[..count].iter_mut().enumerate() {
            // SAFETY: the sums of this tile and group.
            let of_codes = unsafe { code_sums(&matrix.sums, matrix.lanes(tiles.start + r, group)) };
            for (sum, correction) in sums.iter_mut().zip(x.corrections) {
                *sum = _mm512_mullo_epi32(of_codes, _mm512_set1_epi32(*correction));
            }
        }
        let mut blocks = matrix.group_blocks(group);
        while !blocks.is_empty() {
            let some = blocks.start..blocks.end.min(blocks.start.saturating_add(stretch));
            blocks.start = some.end;
            // SAFETY: the blocks exist in each of the tiles; the inputs have T tokens for each of them.
            unsafe {
                let lines = strip.add(some.start * stride);
                let x = x.codes.as_ptr().add(some.start * T * BLOCK_COLS).cast::<i32>();
                let (together, rest) = sums[..count].as_chunks_mut::<R>();
                let mut tile = 0;
                for sums in together {
                    add::<P, APART, R, T>(lines.add(tile * P), stride, some.len(), x, sums);
                    tile += R;
                }
                for sums in rest.as_chunks_mut::<1>().0 {
                    add::<P, APART, 1, T>(lines.add(tile * P), stride, some.len(), x, sums);
                    tile += 1;
                }
            }
        }
        for (r, (sums, totals)) in sums.iter().zip(&mut totals).enumerate().take(count) {
            // SAFETY: a sum a token and group.
            unsafe { add_group(matrix, tiles.start + r, group, x.sums.as_ptr().add(group), sums, totals) };
        }
    }
    for (out, totals) in out.chunks_exact_mut(T).zip(totals) {
        for ((out, total), step) in out.iter_mut().zip(totals).zip(x.steps) {
            // SAFETY: 16 rows.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(total, _mm512_set1_ps(*step))) };
        }
    }
}

/// Adds the products of so many blocks, `stride` lines apart, of `R` neighbouring tiles.
///
/// # Safety
/// They exist, and `x` has `T` tokens for each.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn add<const P: usize, const APART: bool, const R: usize, const T: usize>(
    lines: *const Line,
    stride: usize,
    blocks: usize,
    x: *const i32,
    to: &mut [[__m512i; T]; R],
) {
    let mut sums = *to;
    for block in 0..blocks {
        let lines = lines.wrapping_add(block * stride);
        let x = x.wrapping_add(block * T * 8);
        if R < STRIP {
            for line in 0..R * P {
                _mm_prefetch::<_MM_HINT_T1>(lines.wrapping_add(AHEAD * stride + line).cast());
            }
        }
        // A tile after the other: lines are read in order, which the processor foresees.
        for (r, sums) in sums.iter_mut().enumerate() {
            // Written out: shifts and masks are constants.
            macro_rules! quads {
                ($($quad:literal)*) => { $(
                    // SAFETY: the caller's promise.
                    unsafe {
                        let codes = codes::<P, APART>(lines.add(r * P), $quad);
                        for (t, sum) in sums.iter_mut().enumerate() {
                            let x = _mm512_set1_epi32(x.add(t * 8 + $quad).read_unaligned());
                            *sum = _mm512_dpbusd_epi32(*sum, codes, x);
                        }
                    }
                )* };
            }
            quads!(0 1 2 3 4 5 6 7);
        }
    }
    *to = sums;
}
