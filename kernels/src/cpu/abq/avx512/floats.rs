//! Codes times single precision: codes become floats in registers, 16 rows at once.
//!
//! ```text
//! up to 4 bits:  code, less the centre, from a table of 16       more: in the last bits of 2^23, less 2^23 and the centre
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::inputs::Floats;
use super::super::layout::{Field, Line, Zeros, fields};
use super::super::{BLOCK_COLS, Matrix, TILE_ROWS};
use super::{by_planes, lanes, zeros};

/// Lines ahead that are asked of memory, in bytes.
const AHEAD: usize = 2 << 10;

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
                    2 => run::<$planes, 2, 2>(matrix, tiles, x, totals),
                    4 => run::<$planes, 2, 4>(matrix, tiles, x, totals),
                    8 => run::<$planes, 1, 8>(matrix, tiles, x, totals),
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

/// All tiles, mostly `R` at a time.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn run<const P: usize, const R: usize, const T: usize>(
    matrix: &Matrix,
    tiles: Range<usize>,
    x: &Floats<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    let mut tile = tiles.start;
    while tile < tiles.end {
        let out = &mut totals[(tile - tiles.start) * T..];
        // SAFETY: the tiles exist.
        unsafe {
            if tiles.end - tile >= R {
                some::<P, R, T>(matrix, tile, x, out);
                tile += R;
            } else {
                some::<P, 1, T>(matrix, tile, x, out);
                tile += 1;
            }
        }
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

/// `R` tiles by `T` tokens.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
#[inline]
unsafe fn some<const P: usize, const R: usize, const T: usize>(
    matrix: &Matrix,
    tile: usize,
    x: &Floats<'_>,
    out: &mut [[f32; TILE_ROWS]],
) {
    const INTEGER: i32 = 0x4b00_0000;
    let centre = matrix.centre();
    let mut table = [0.0f32; 16];
    for (i, value) in table.iter_mut().enumerate() {
        *value = (i % (1 << P.min(4))) as f32 - centre;
    }
    // SAFETY: 16 values.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    let (mask, integer) = (_mm512_set1_epi32((1 << P) - 1), _mm512_set1_epi32(INTEGER));
    let less = _mm512_set1_ps(f32::from_bits(INTEGER as u32) + centre);
    let mut totals = [[_mm512_setzero_ps(); T]; R];
    let stride = matrix.blocks() * P;
    for group in 0..matrix.groups {
        let mut sums = [[_mm512_setzero_ps(); T]; R];
        for block in matrix.group_blocks(group) {
            // SAFETY: the block exists in each of the tiles; the inputs have T tokens for each of its columns.
            unsafe {
                let lines = matrix.lines.as_ptr().add(tile * stride + block * P);
                let x = x.x.as_ptr().add(block * BLOCK_COLS * T);
                if T <= 4 {
                    for r in 0..R {
                        for line in 0..P {
                            let next = lines.add(r * stride + line).cast::<i8>().wrapping_add(AHEAD);
                            _mm_prefetch::<_MM_HINT_T0>(next);
                        }
                    }
                }
                for col in 0..BLOCK_COLS {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let codes = column::<P>(lines.add(r * stride), col);
                        let weights = if P <= 4 {
                            _mm512_permutexvar_ps(codes, table)
                        } else {
                            // (codes & mask) | integer
                            let float = _mm512_ternarylogic_epi32::<0xea>(codes, mask, integer);
                            _mm512_sub_ps(_mm512_castsi512_ps(float), less)
                        };
                        for (t, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_fmadd_ps(weights, _mm512_set1_ps(*x.add(col * T + t)), *sum);
                        }
                    }
                }
            }
        }
        for (r, (sums, totals)) in sums.iter().zip(&mut totals).enumerate() {
            let at = ((tile + r) * matrix.groups + group) * TILE_ROWS;
            // SAFETY: the lanes of this tile and group, and a sum a token and group.
            unsafe {
                let scale = lanes(&matrix.scale, at);
                for (t, (sum, total)) in sums.iter().zip(totals).enumerate() {
                    let of_inputs = _mm512_set1_ps(x.sums[t * matrix.groups + group]);
                    match &matrix.zero {
                        Zeros::Symmetric => *total = _mm512_fmadd_ps(scale, *sum, *total),
                        Zeros::Integer(values) => {
                            let zero = _mm512_cvtepi32_ps(zeros(values, at));
                            let from = _mm512_sub_ps(_mm512_set1_ps(centre), zero);
                            *total = _mm512_fmadd_ps(scale, _mm512_fmadd_ps(from, of_inputs, *sum), *total);
                        }
                        Zeros::Real(offset) => {
                            let offset = _mm512_fmadd_ps(scale, _mm512_set1_ps(centre), lanes(offset, at));
                            *total = _mm512_fmadd_ps(scale, *sum, *total);
                            *total = _mm512_fmadd_ps(offset, of_inputs, *total);
                        }
                    }
                }
            }
        }
    }
    for (out, totals) in out.chunks_exact_mut(T).zip(totals) {
        for (out, total) in out.iter_mut().zip(totals) {
            // SAFETY: 16 rows.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
        }
    }
}
