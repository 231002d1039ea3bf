//! AVX-512: a line a vector, 16 rows at once.

mod count;
mod floats;
mod integers;

use std::arch::x86_64::*;
use std::ops::Range;

use super::inputs::{Chunk, Form, MOST_TOKENS};
use super::layout::{Field, Lanes, Line, Sums, Zeros, fields};
use super::{Matrix, STRIP, TILE_ROWS};

/// Whether vectors of counted bits are to be had.
pub(super) fn counts_bits() -> bool {
    is_x86_feature_detected!("avx512vpopcntdq")
}

/// As [`super::plain::multiply`]; only where AVX-512 F, BW, VL, DQ and VBMI were detected.
pub(super) fn multiply(
    matrix: &Matrix,
    tiles: Range<usize>,
    chunk: &Chunk<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    assert!(tiles.end * TILE_ROWS < matrix.rows + TILE_ROWS && totals.len() == tiles.len() * chunk.padded);
    assert!(chunk.padded.is_power_of_two() && chunk.padded <= MOST_TOKENS);
    assert!(tiles.is_empty() || tiles.start / STRIP == (tiles.end - 1) / STRIP);
    match chunk.form {
        Form::Floats(x) => floats::multiply(matrix, tiles, &x, totals),
        Form::Integers(x) if !x.planes.is_empty() => count::multiply(matrix, tiles, &x, totals),
        Form::Integers(x) if is_x86_feature_detected!("avx512vnni") => {
            integers::multiply(matrix, tiles, &x, totals);
        }
        Form::Integers(_) => super::avx2::multiply(matrix, tiles, chunk, totals),
    }
}

/// Bits `shift ..` of each byte moved down to bits `offset ..` of it, with others beside them.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn moved(line: __m512i, shift: usize, offset: usize) -> __m512i {
    if shift > offset {
        _mm512_srl_epi16(line, _mm_cvtsi32_si128((shift - offset) as i32))
    } else if shift < offset {
        _mm512_sll_epi16(line, _mm_cvtsi32_si128((offset - shift) as i32))
    } else {
        line
    }
}

/// Codes of four neighbouring columns, the `quad`th of a block, of 16 rows: a byte each.
///
/// # Safety
/// `lines` are all of a block of `P` planes.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn codes<const P: usize, const APART: bool>(lines: *const Line, quad: usize) -> __m512i {
    let (fields, count): ([Field; 8], usize) = const { fields(P, APART) };
    let mut codes = _mm512_setzero_si512();
    let mut i = 0;
    while i < count {
        let Field { bits, offset } = fields[i];
        let at = quad * bits;
        // SAFETY: a field has as many lines as bits.
        let line = unsafe { _mm512_load_si512(lines.add(offset + at / 8).cast()) };
        let mask = _mm512_set1_epi8(((u8::MAX >> (8 - bits)) << offset) as i8);
        let moved = moved(line, at % 8, offset);
        codes = if i == 0 {
            _mm512_and_si512(moved, mask)
        } else {
            // codes | (moved & mask)
            _mm512_ternarylogic_epi32::<0xf8>(codes, moved, mask)
        };
        i += 1;
    }
    codes
}

/// Values of 16 rows.
///
/// # Safety
/// There are 16 from `at` on.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
#[inline]
unsafe fn lanes(lanes: &Lanes, at: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match lanes {
            Lanes::F16(x) => _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().add(at).cast())),
            Lanes::Bf16(x) => {
                let words = _mm256_loadu_si256(x.as_ptr().add(at).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
            }
            Lanes::F32(x) => _mm512_loadu_ps(x.as_ptr().add(at)),
        }
    }
}

/// Sums of codes of 16 rows.
///
/// # Safety
/// There are 16 from `at` on, if there are any.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn code_sums(sums: &Sums, at: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        match sums {
            Sums::None => _mm512_setzero_si512(),
            Sums::Narrow(x) => _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().add(at).cast())),
            Sums::Wide(x) => _mm512_loadu_si512(x.as_ptr().add(at).cast()),
        }
    }
}

/// Integer zeros of 16 rows.
///
/// # Safety
/// There are 16 from `at` on.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn zeros(zeros: &[u8], at: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.as_ptr().add(at).cast())) }
}

/// Blocks from the one that is multiplied to the one that is asked of memory meanwhile, where arithmetic takes longer than
/// reading: measured. Where it does not, the processor foresees better what is read in order.
const AHEAD: usize = 8;

/// Adds the exact sums of a group, `sums[token]`, to the totals.
///
/// # Safety
/// The tile exists, and `of_inputs` holds the sum of each token, `groups` apart.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
#[inline]
unsafe fn add_group<const T: usize>(
    matrix: &Matrix,
    tile: usize,
    group: usize,
    of_inputs: *const i32,
    sums: &[__m512i; T],
    totals: &mut [__m512; T],
) {
    let at = matrix.lanes(tile, group);
    // SAFETY: the lanes of this tile and group; the caller's promise.
    unsafe {
        let scale = lanes(&matrix.scale, at);
        match &matrix.zero {
            Zeros::Real(offset) => {
                let offset = lanes(offset, at);
                for (t, (sum, total)) in sums.iter().zip(totals).enumerate() {
                    let of_inputs = _mm512_set1_ps(*of_inputs.add(t * matrix.groups) as f32);
                    *total = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(*sum), *total);
                    *total = _mm512_fmadd_ps(offset, of_inputs, *total);
                }
            }
            symmetric_or_integer => {
                let zero = match symmetric_or_integer {
                    Zeros::Integer(values) => zeros(values, at),
                    _ => _mm512_set1_epi32(1 << (matrix.bits - 1)),
                };
                for (t, (sum, total)) in sums.iter().zip(totals).enumerate() {
                    let of_inputs = _mm512_set1_epi32(*of_inputs.add(t * matrix.groups));
                    let sum = _mm512_sub_epi32(*sum, _mm512_mullo_epi32(of_inputs, zero));
                    *total = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum), *total);
                }
            }
        }
    }
}

/// Calls a kernel, generic over planes and whether they lie apart.
macro_rules! by_planes {
    ($planes:expr, $apart:expr, $body:ident) => {
        match ($planes, $apart) {
            (1, _) => $body!(1, false),
            (2, false) => $body!(2, false),
            (2, true) => $body!(2, true),
            (3, false) => $body!(3, false),
            (3, true) => $body!(3, true),
            (4, false) => $body!(4, false),
            (4, true) => $body!(4, true),
            (5, _) => $body!(5, false),
            (6, _) => $body!(6, false),
            (7, _) => $body!(7, false),
            _ => $body!(8, false),
        }
    };
}
use by_planes;
