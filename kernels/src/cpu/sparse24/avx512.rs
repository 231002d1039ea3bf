//! AVX-512: positions become a bit a column, by which the values of 64 columns are spread.

use std::arch::x86_64::*;

use super::{KEPT, Sparse24};
use crate::cpu::Elements;

/// Columns that are spread at a time: a cache line of positions.
pub(in crate::cpu) const STEP: usize = 512;

/// Values that are spread over 64 columns by the bits of a mask.
pub(in crate::cpu) trait Spread {
    type Word: Copy;

    /// 32 values as 64 weights in single precision, zeros between them.
    ///
    /// # Safety
    /// 32 values, or as many as `count`, can be read.
    #[allow(unsafe_code)]
    unsafe fn spread(from: *const Self::Word, count: usize, kept: u64) -> [__m512; 4];
}

pub(in crate::cpu) struct Single;
pub(in crate::cpu) struct Bf16;
pub(in crate::cpu) struct Half;

/// The lowest `count` lanes of 32, or all.
fn first_lanes(count: usize) -> __mmask32 {
    if count < 32 { (1 << count) - 1 } else { __mmask32::MAX }
}

impl Spread for Single {
    type Word = f32;

    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
    #[inline]
    unsafe fn spread(from: *const f32, count: usize, kept: u64) -> [__m512; 4] {
        let lanes = first_lanes(count);
        std::array::from_fn(|i| {
            // SAFETY: the mask leaves out what is past the end.
            let values =
                unsafe { _mm512_maskz_loadu_ps((lanes >> (8 * i)) as u16 & 0xff, from.wrapping_add(8 * i)) };
            _mm512_maskz_expand_ps((kept >> (16 * i)) as u16, values)
        })
    }
}

/// 16-bit values spread over two times 32 columns.
///
/// # Safety
/// As [`Spread::spread`].
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
#[inline]
pub(in crate::cpu) unsafe fn expand(from: *const u16, count: usize, kept: u64) -> [__m512i; 2] {
    let lanes = first_lanes(count);
    // SAFETY: the caller's promise; the masks leave out what is past the end.
    let (low, high) = unsafe {
        (
            _mm256_maskz_loadu_epi16(lanes as u16, from.cast()),
            _mm256_maskz_loadu_epi16((lanes >> 16) as u16, from.wrapping_add(16).cast()),
        )
    };
    [
        _mm512_maskz_expand_epi16(kept as u32, _mm512_castsi256_si512(low)),
        _mm512_maskz_expand_epi16((kept >> 32) as u32, _mm512_castsi256_si512(high)),
    ]
}

/// The same as four times 16 columns.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
#[inline]
unsafe fn words(from: *const u16, count: usize, kept: u64) -> [__m256i; 4] {
    // SAFETY: the caller's promise.
    let [low, high] = unsafe { expand(from, count, kept) };
    [
        _mm512_castsi512_si256(low),
        _mm512_extracti64x4_epi64::<1>(low),
        _mm512_castsi512_si256(high),
        _mm512_extracti64x4_epi64::<1>(high),
    ]
}

impl Spread for Bf16 {
    type Word = u16;

    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
    #[inline]
    unsafe fn spread(from: *const u16, count: usize, kept: u64) -> [__m512; 4] {
        // SAFETY: the caller's promise.
        let words = unsafe { words(from, count, kept) };
        words.map(|w| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(w))))
    }
}

impl Spread for Half {
    type Word = u16;

    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
    #[inline]
    unsafe fn spread(from: *const u16, count: usize, kept: u64) -> [__m512; 4] {
        // SAFETY: the caller's promise.
        let words = unsafe { words(from, count, kept) };
        words.map(|w| _mm512_cvtph_ps(w))
    }
}

/// Of up to 512 columns, a bit each: whether it is kept.
pub(in crate::cpu) type Kept = [u64; STEP / 64];

/// Reads the positions of up to 512 columns. Whether all of them are right.
///
/// # Safety
/// The processor has AVX-512 F and BW.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(in crate::cpu) unsafe fn kept(positions: &[u8], cols: usize, kept: &mut Kept) -> bool {
    let cols = cols.min(STEP);
    let bytes = cols.div_ceil(8).min(positions.len());
    let lanes = if bytes < 64 { (1u64 << bytes) - 1 } else { u64::MAX };
    // SAFETY: the mask leaves out what is past the end; sixteen bytes, and 64 of `kept`.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(KEPT.as_ptr().cast()));
        let bytes = _mm512_maskz_loadu_epi8(lanes, positions.as_ptr().cast());
        let nibble = _mm512_set1_epi8(15);
        let low_nibbles = _mm512_and_si512(bytes, nibble);
        let high_nibbles = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
        let low = _mm512_shuffle_epi8(table, low_nibbles);
        let high = _mm512_shuffle_epi8(table, high_nibbles);
        // An odd quad that is not there has the nibble 0.
        let odd = if cols.is_multiple_of(8) { lanes } else { lanes >> 1 };
        let good = _mm512_mask_test_epi8_mask(lanes, low, low) == lanes
            && _mm512_mask_test_epi8_mask(odd, high, high) == odd
            && _mm512_mask_test_epi8_mask(lanes & !odd, high_nibbles, high_nibbles) == 0;
        // Four bits stay within their byte.
        let both = _mm512_or_si512(low, _mm512_slli_epi16::<4>(high));
        _mm512_storeu_si512(kept.as_mut_ptr().cast(), both);
        good
    }
}

/// As [`Sparse24::widen`]; whether the positions are right.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VBMI2; `out` has all rows.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
pub(super) unsafe fn widen(sparse: &Sparse24<'_>, out: &mut [f32]) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match sparse.values() {
            Elements::F32(values) => all::<Single>(sparse, values.as_ptr(), out),
            Elements::Bf16(values) => all::<Bf16>(sparse, values.as_ptr(), out),
            Elements::F16(values) => all::<Half>(sparse, values.as_ptr(), out),
        }
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
unsafe fn all<S: Spread>(sparse: &Sparse24<'_>, values: *const S::Word, out: &mut [f32]) -> bool {
    let (cols, mut bits) = (sparse.cols(), [0u64; STEP / 64]);
    for (row, out) in out.chunks_exact_mut(cols.max(1)).enumerate() {
        let positions = sparse.positions(row);
        for (part, positions) in positions.chunks(STEP / 8).enumerate() {
            let first = part * STEP;
            // SAFETY: the processor has it.
            if !unsafe { kept(positions, cols - first, &mut bits) } {
                return false;
            }
            for (i, &bits) in bits.iter().enumerate() {
                let at = first + 64 * i;
                if at >= cols {
                    break;
                }
                let left = cols - at;
                // SAFETY: a row has `cols / 2` values; the masks leave out what is past the end of the row.
                unsafe {
                    let from = values.add((row * cols + at) / 2);
                    let spread = S::spread(from, left / 2, bits);
                    for (v, lanes) in spread.into_iter().enumerate() {
                        let count = left.saturating_sub(16 * v).min(16);
                        let mask = ((1u32 << count) - 1) as u16;
                        _mm512_mask_storeu_ps(out.as_mut_ptr().wrapping_add(at + 16 * v), mask, lanes);
                    }
                }
            }
        }
    }
    true
}
