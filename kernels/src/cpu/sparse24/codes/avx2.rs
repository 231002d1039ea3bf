//! AVX2: the codes of 64 columns as bytes, of which a table of 256 spreads four over eight columns.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{BLOCK_COLS, BLOCK_KEPT, Grids, KEPT_WORDS, SparseCodes};
use crate::cpu::abq::fields;

/// Of each byte of kept columns, which of the kept ones a column is; 128 where it is not kept.
pub(in crate::cpu) static PLACES: [[u8; 8]; 256] = {
    let mut all = [[128; 8]; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut column, mut next) = (0, 0);
        while column < 8 {
            if byte >> column & 1 == 1 {
                all[byte][column] = next;
                next += 1;
            }
            column += 1;
        }
        byte += 1;
    }
    all
};

/// Codes of the kept columns of a block, and room to read past them.
pub(in crate::cpu) type Bytes = [u8; BLOCK_KEPT + 8];

/// The codes of a block.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu) fn bytes(planes: usize, words: &[u32], out: &mut Bytes) {
    let (fields, count) = fields(planes, false);
    let mut codes = _mm256_setzero_si256();
    for field in &fields[..count] {
        let of_field = &words[KEPT_WORDS + field.offset..][..field.bits];
        let bits = match *of_field {
            [a, b, c, d] => {
                let all = _mm256_broadcastsi128_si256(_mm_setr_epi32(a as i32, b as i32, c as i32, d as i32));
                let down = _mm256_srlv_epi64(all, _mm256_setr_epi64x(0, 0, 4, 4));
                _mm256_and_si256(down, _mm256_set1_epi8(15))
            }
            [a, b] => {
                let all = _mm256_set1_epi64x((u64::from(a) | u64::from(b) << 32) as i64);
                let down = _mm256_srlv_epi64(all, _mm256_setr_epi64x(0, 2, 4, 6));
                _mm256_and_si256(down, _mm256_set1_epi8(3))
            }
            _ => {
                // Byte i of the word eight times, of which each keeps a bit.
                let word = _mm256_set1_epi32(of_field.first().copied().unwrap_or(0) as i32);
                let spread = _mm256_setr_epi64x(
                    0,
                    0x0101_0101_0101_0101,
                    0x0202_0202_0202_0202,
                    0x0303_0303_0303_0303,
                );
                let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                let bits = _mm256_and_si256(_mm256_shuffle_epi8(word, spread), bit);
                _mm256_and_si256(_mm256_cmpeq_epi8(bits, bit), _mm256_set1_epi8(1))
            }
        };
        // Bits stay within their byte.
        let moved = _mm256_sll_epi16(bits, _mm_cvtsi32_si128(field.offset as i32));
        codes = _mm256_or_si256(codes, moved);
    }
    // SAFETY: 32 bytes of 40.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), codes) };
}

/// Eight weights of which `kept` says which are kept, from their codes' bytes: `bytes` has eight, of which four count.
///
/// # Safety
/// The processor has AVX2; eight bytes can be read.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu) unsafe fn weights<const REAL: bool>(
    bytes: *const u8,
    kept: u8,
    scale: __m256,
    zero: __m256,
) -> __m256 {
    // SAFETY: the caller's promise; eight bytes of the table.
    let (codes, places) = unsafe {
        (_mm_loadl_epi64(bytes.cast()), _mm_loadl_epi64(PLACES[usize::from(kept)].as_ptr().cast()))
    };
    let codes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_shuffle_epi8(codes, places)));
    let weights = if REAL {
        // The product is rounded before the sum.
        _mm256_add_ps(_mm256_mul_ps(scale, codes), zero)
    } else {
        _mm256_mul_ps(scale, _mm256_sub_ps(codes, zero))
    };
    // The highest bit says that there is none.
    let none = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(places));
    _mm256_blendv_ps(weights, _mm256_setzero_ps(), none)
}

/// As [`SparseCodes::widen`].
///
/// # Safety
/// The processor has AVX2; the rows exist, and `out` has room for them.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn widen(codes: &SparseCodes, rows: Range<usize>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        if codes.has_offsets() { all::<true>(codes, rows, out) } else { all::<false>(codes, rows, out) }
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
unsafe fn all<const REAL: bool>(codes: &SparseCodes, rows: Range<usize>, out: &mut [f32]) {
    let (cols, of_block) = (codes.cols(), codes.block_words());
    let (mut grids, mut codes8): (_, Bytes) = (Grids::default(), [0; BLOCK_KEPT + 8]);
    for (row, out) in rows.zip(out.chunks_exact_mut(cols.max(1))) {
        codes.grids(row..row + 1, &mut grids);
        for group in 0..codes.groups() {
            let scale = _mm256_set1_ps(grids.scale[group]);
            let zero = _mm256_set1_ps(grids.zero[group]);
            for block in codes.group(group) {
                let words = &codes.row(row)[block * of_block..][..of_block];
                bytes(codes.planes(), words, &mut codes8);
                let out = &mut out[block * BLOCK_COLS..];
                for (v, out) in out.chunks_mut(8).take(8).enumerate() {
                    let kept = (words[v / 4] >> (8 * (v % 4))) as u8;
                    let mut eight = [0.0f32; 8];
                    // SAFETY: byte 28 is the last to begin at, of 40; eight lanes.
                    unsafe {
                        let weights = weights::<REAL>(codes8.as_ptr().add(4 * v), kept, scale, zero);
                        _mm256_storeu_ps(eight.as_mut_ptr(), weights);
                    }
                    out.copy_from_slice(&eight[..out.len()]);
                }
            }
        }
    }
}
