//! Planes times planes: bits that both have, counted a word a row.
//!
//! ```text
//! sum over i, j of 2^(i + j) popcount(W_i & X_j)
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::inputs::Integers;
use super::super::{Matrix, STRIP, TILE_ROWS};
use super::{add_group, code_sums};

pub(super) fn multiply(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Integers<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    // SAFETY: the caller detected the features and checked the tiles; inputs with planes are made for such a matrix and
    // such a processor only.
    #[allow(unsafe_code)]
    unsafe {
        match (matrix.planes, x.bits) {
            (1, 1) => run::<1, 1>(matrix, tiles, x, totals),
            (1, 2) => run::<1, 2>(matrix, tiles, x, totals),
            (1, 3) => run::<1, 3>(matrix, tiles, x, totals),
            (1, 4) => run::<1, 4>(matrix, tiles, x, totals),
            (2, 1) => run::<2, 1>(matrix, tiles, x, totals),
            (2, 2) => run::<2, 2>(matrix, tiles, x, totals),
            (3, 1) => run::<3, 1>(matrix, tiles, x, totals),
            _ => run::<4, 1>(matrix, tiles, x, totals),
        }
    }
}

/// Tiles of a strip, all at once if it is whole, token after token.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,f16c")]
unsafe fn run<const P: usize, const Q: usize>(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Integers<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    let tokens = x.steps.len();
    for token in 0..tokens {
        // SAFETY: the tiles and the token exist.
        unsafe {
            if tiles.len() == STRIP {
                some::<P, Q, STRIP>(matrix, tiles.start, x, token, &mut totals[token..]);
                continue;
            }
            for (tile, totals) in tiles.clone().zip(totals.chunks_exact_mut(tokens)) {
                some::<P, Q, 1>(matrix, tile, x, token, &mut totals[token..]);
            }
        }
    }
}

/// `R` tiles of a strip by a token.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,f16c")]
#[inline]
unsafe fn some<const P: usize, const Q: usize, const R: usize>(
    matrix: &Matrix,
    tile: usize,
    x: &Integers<'_>,
    token: usize,
    out: &mut [[f32; TILE_ROWS]],
) {
    let tokens = x.steps.len();
    let mut totals = [[_mm512_setzero_ps(); 1]; R];
    let stride = matrix.strip_tiles(tile) * P;
    let strip = matrix.lines.as_ptr().wrapping_add(matrix.block(tile, 0));
    for group in 0..matrix.groups {
        // Of i + j.
        let mut counts = [[_mm512_setzero_si512(); 4]; R];
        for block in matrix.group_blocks(group) {
            // SAFETY: the block exists in each of the tiles, and its planes of the token.
            unsafe {
                let lines = strip.add(block * stride);
                let x = x.planes.as_ptr().add((block * tokens + token) * Q).cast::<i32>();
                for j in 0..Q {
                    let x = _mm512_set1_epi32(*x.add(j));
                    for (r, counts) in counts.iter_mut().enumerate() {
                        for i in 0..P {
                            let line = _mm512_load_si512(lines.add(r * P + i).cast());
                            let both = _mm512_popcnt_epi32(_mm512_and_si512(line, x));
                            counts[i + j] = _mm512_add_epi32(counts[i + j], both);
                        }
                    }
                }
            }
        }
        for (r, (total, counts)) in totals.iter_mut().zip(counts).enumerate() {
            // SAFETY: the sums of this tile and group; a sum a token and group.
            unsafe {
                let of_codes = code_sums(&matrix.sums, matrix.lanes(tile + r, group));
                let mut sum = _mm512_mullo_epi32(of_codes, _mm512_set1_epi32(x.corrections[token]));
                for (i, count) in counts.into_iter().enumerate().take(P + Q - 1) {
                    sum = _mm512_add_epi32(sum, _mm512_sll_epi32(count, _mm_cvtsi32_si128(i as i32)));
                }
                let of_inputs = x.sums.as_ptr().add(token * matrix.groups + group);
                add_group(matrix, tile + r, group, of_inputs, &[sum], total);
            }
        }
    }
    let step = _mm512_set1_ps(x.steps[token]);
    for (out, [total]) in out.iter_mut().step_by(tokens).zip(totals) {
        // SAFETY: 16 rows.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(total, step)) };
    }
}
