//! Codes times codes by VNNI: 64 products an instruction, four to each row's sum.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::inputs::Integers;
use super::super::layout::{Field, fields};
use super::super::{BLOCK_COLS, Matrix, TILE_ROWS};
use super::{add_group, by_planes, code_sums, codes};

/// Lines ahead that are asked of memory, in bytes.
const AHEAD: usize = 2 << 10;

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
                    2 => run::<$planes, $apart, 2, 2>(matrix, tiles, x, totals),
                    4 => run::<$planes, $apart, 2, 4>(matrix, tiles, x, totals),
                    8 => run::<$planes, $apart, 1, 8>(matrix, tiles, x, totals),
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

/// All tiles, mostly `R` at a time.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn run<const P: usize, const APART: bool, const R: usize, const T: usize>(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Integers<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    let mut tile = tiles.start;
    while tile < tiles.end {
        let out = &mut totals[(tile - tiles.start) * T..];
        // SAFETY: the tiles exist.
        unsafe {
            if tiles.end - tile >= R {
                some::<P, APART, R, T>(matrix, tile, x, out);
                tile += R;
            } else {
                some::<P, APART, 1, T>(matrix, tile, x, out);
                tile += 1;
            }
        }
    }
}

/// `R` tiles by `T` tokens.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn some<const P: usize, const APART: bool, const R: usize, const T: usize>(
    matrix: &Matrix,
    tile: usize,
    x: &Integers<'_>,
    out: &mut [[f32; TILE_ROWS]],
) {
    let (fields, count): ([Field; 8], usize) = const { fields(P, APART) };
    let mut totals = [[_mm512_setzero_ps(); T]; R];
    let stride = matrix.blocks() * P;
    for group in 0..matrix.groups {
        let mut sums = [[_mm512_setzero_si512(); T]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            let at = ((tile + r) * matrix.groups + group) * TILE_ROWS;
            // SAFETY: the sums of this tile and group.
            let of_codes = unsafe { code_sums(&matrix.sums, at) };
            for (sum, correction) in sums.iter_mut().zip(x.corrections) {
                *sum = _mm512_mullo_epi32(of_codes, _mm512_set1_epi32(*correction));
            }
        }
        for block in matrix.group_blocks(group) {
            // SAFETY: the block exists in each of the tiles; the inputs have a block of T tokens for it.
            unsafe {
                let lines = matrix.lines.as_ptr().add(tile * stride + block * P);
                let x = x.codes.as_ptr().add(block * T * BLOCK_COLS).cast::<i32>();
                if T <= 4 {
                    for r in 0..R {
                        for line in 0..P {
                            let next = lines.add(r * stride + line).cast::<i8>().wrapping_add(AHEAD);
                            _mm_prefetch::<_MM_HINT_T0>(next);
                        }
                    }
                }
                for quad in 0..8 {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let codes = codes(lines.add(r * stride), &fields, count, quad);
                        for (t, sum) in sums.iter_mut().enumerate() {
                            let x = _mm512_set1_epi32(x.add(t * 8 + quad).read_unaligned());
                            *sum = _mm512_dpbusd_epi32(*sum, codes, x);
                        }
                    }
                }
            }
        }
        // SAFETY: a sum a token and group.
        unsafe { add_group(matrix, tile, group, x.sums.as_ptr().add(group), &sums, &mut totals) };
    }
    for (out, totals) in out.chunks_exact_mut(T).zip(totals) {
        for ((out, total), step) in out.iter_mut().zip(totals).zip(x.steps) {
            // SAFETY: 16 rows.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(total, _mm512_set1_ps(*step))) };
        }
    }
}
