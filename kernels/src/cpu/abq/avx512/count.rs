//! Planes times planes: bits that both have, counted a word a row.
//!
//! ```text
//! sum over i, j of 2^(i + j) popcount(W_i & X_j)
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::inputs::Integers;
use super::super::{Matrix, TILE_ROWS};
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

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,f16c")]
unsafe fn run<const P: usize, const Q: usize>(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Integers<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    let tokens = x.steps.len();
    let mut tile = tiles.start;
    while tile < tiles.end {
        let count = if tiles.end - tile >= 4 { 4 } else { 1 };
        for token in 0..tokens {
            let out = &mut totals[(tile - tiles.start) * tokens + token..];
            // SAFETY: the tiles and the token exist.
            unsafe {
                match count {
                    4 => some::<P, Q, 4>(matrix, tile, x, token, out),
                    _ => some::<P, Q, 1>(matrix, tile, x, token, out),
                }
            }
        }
        tile += count;
    }
}

/// `R` tiles by a token.
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
    let stride = matrix.blocks() * P;
    for group in 0..matrix.groups {
        let mut sums = [[_mm512_setzero_si512(); 1]; R];
        // Of i + j.
        let mut counts = [[_mm512_setzero_si512(); 4]; R];
        for block in matrix.group_blocks(group) {
            // SAFETY: the block exists in each of the tiles, and its planes of the token.
            unsafe {
                let lines = matrix.lines.as_ptr().add(tile * stride + block * P);
                let x = x.planes.as_ptr().add((block * tokens + token) * Q).cast::<i32>();
                for j in 0..Q {
                    let x = _mm512_set1_epi32(*x.add(j));
                    for (r, counts) in counts.iter_mut().enumerate() {
                        for i in 0..P {
                            let line = _mm512_load_si512(lines.add(r * stride + i).cast());
                            let both = _mm512_popcnt_epi32(_mm512_and_si512(line, x));
                            counts[i + j] = _mm512_add_epi32(counts[i + j], both);
                        }
                    }
                }
            }
        }
        for (r, (sums, counts)) in sums.iter_mut().zip(counts).enumerate() {
            let at = ((tile + r) * matrix.groups + group) * TILE_ROWS;
            // SAFETY: the sums of this tile and group.
            let of_codes = unsafe { code_sums(&matrix.sums, at) };
            sums[0] = _mm512_mullo_epi32(of_codes, _mm512_set1_epi32(x.corrections[token]));
            for (i, count) in counts.into_iter().enumerate().take(P + Q - 1) {
                sums[0] = _mm512_add_epi32(sums[0], _mm512_sll_epi32(count, _mm_cvtsi32_si128(i as i32)));
            }
        }
        // SAFETY: a sum a token and group.
        unsafe {
            let of_inputs = x.sums.as_ptr().add(token * matrix.groups + group);
            add_group(matrix, tile, group, of_inputs, &sums, &mut totals);
        }
    }
    let step = _mm512_set1_ps(x.steps[token]);
    for (out, [total]) in out.iter_mut().step_by(tokens).zip(totals) {
        // SAFETY: 16 rows.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(total, step)) };
    }
}
