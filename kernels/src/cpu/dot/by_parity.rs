//! AVX-512: columns whose even and odd ones lie apart, so that a word of two bfloat16 weights is widened by a shift and a mask.

use std::arch::x86_64::*;

/// Up to 64 values, even and odd ones of each half apart, and which of them exist.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn by_parity(x: &[f32]) -> ([__m512; 4], [__mmask16; 4]) {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    let load = |first: usize| {
        // SAFETY: the mask leaves out what is past the end.
        unsafe {
            _mm512_maskz_loadu_ps(first_lanes(x.len().saturating_sub(first)), x.as_ptr().wrapping_add(first))
        }
    };
    let mut lanes = [_mm512_setzero_ps(); 4];
    let mut masks = [__mmask16::MAX; 4];
    for half in 0..2 {
        let (a, b) = (load(32 * half), load(32 * half + 16));
        let count = x.len().saturating_sub(32 * half);
        lanes[2 * half] = _mm512_permutex2var_ps(a, even, b);
        lanes[2 * half + 1] = _mm512_permutex2var_ps(a, odd, b);
        masks[2 * half] = first_lanes(count.div_ceil(2));
        masks[2 * half + 1] = first_lanes(count / 2);
    }
    (lanes, masks)
}

/// The tree of [`super::fold`] where even and odd columns lie apart.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn fold(sums: [__m512; 4]) -> f32 {
    // [even 0..16 | odd 0..16] of 32 columns, then eight of each, four of each.
    let (even, odd) = (_mm512_add_ps(sums[0], sums[2]), _mm512_add_ps(sums[1], sums[3]));
    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(even, odd);
    let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(even, odd);
    let sixteen = _mm512_add_ps(low, high);
    let low = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b00_00_10_00>(sixteen, sixteen));
    let high = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b00_00_11_01>(sixteen, sixteen));
    let eight = _mm256_add_ps(low, high);
    let four = _mm256_add_ps(eight, _mm256_permute_ps::<0b00_00_11_10>(eight));
    let two = _mm256_add_ps(four, _mm256_movehdup_ps(four));
    _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(two), _mm256_extractf128_ps::<1>(two)))
}

/// The lowest `count` lanes, or all.
pub(super) fn first_lanes(count: usize) -> __mmask16 {
    if count < 16 { (1 << count) - 1 } else { __mmask16::MAX }
}
