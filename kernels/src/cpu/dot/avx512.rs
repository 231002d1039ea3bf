//! AVX-512: four rows at a time, sixteen weights a vector.

use std::arch::x86_64::*;

use super::ahead;
use crate::cpu::Elements;

/// As [`super::dot_rows`].
///
/// # Safety
/// The processor has AVX-512 F, BW and VL; `weights` covers the rows of `out`, `stride` apart.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) unsafe fn dot_rows(weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match weights {
            Elements::F32(w) => all::<Single>(w.as_ptr(), stride, x, out),
            Elements::Bf16(w) => all::<Bf16>(w.as_ptr(), stride, x, out),
            Elements::F16(w) => all::<Half>(w.as_ptr(), stride, x, out),
        }
    }
}

/// Sixteen stored weights as single precision.
pub(in crate::cpu) trait Load {
    type Word: Copy;

    /// # Safety
    /// The lanes of `mask` can be read.
    #[allow(unsafe_code)]
    unsafe fn load(from: *const Self::Word, mask: __mmask16) -> __m512;
}

pub(in crate::cpu) struct Single;
pub(in crate::cpu) struct Bf16;
pub(in crate::cpu) struct Half;

impl Load for Single {
    type Word = f32;

    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    #[inline]
    unsafe fn load(from: *const f32, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Load for Bf16 {
    type Word = u16;

    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    #[inline]
    unsafe fn load(from: *const u16, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        let words = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
    }
}

impl Load for Half {
    type Word = u16;

    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    #[inline]
    unsafe fn load(from: *const u16, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
unsafe fn all<L: Load>(weights: *const L::Word, stride: usize, x: &[f32], out: &mut [f32]) {
    let mut row = 0;
    while row < out.len() {
        // SAFETY: rows row .. row + R exist.
        unsafe {
            let w = weights.add(row * stride);
            if out.len() - row >= 4 {
                out[row..row + 4].copy_from_slice(&rows::<L, 4>(w, stride, x));
                row += 4;
            } else {
                out[row] = rows::<L, 1>(w, stride, x)[0];
                row += 1;
            }
        }
    }
}

/// `R` rows. What lies `R` rows on, or a multiple of that, is brought into the second cache.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
#[inline]
unsafe fn rows<L: Load, const R: usize>(weights: *const L::Word, stride: usize, x: &[f32]) -> [f32; R] {
    let mut sums = [[_mm512_setzero_ps(); 4]; R];
    let whole = x.len() / 64 * 64;
    let ahead = ahead(R.saturating_mul(stride), size_of::<L::Word>());
    for k in (0..whole).step_by(64) {
        for r in 0..R {
            let next = weights.wrapping_add(r * stride + k).cast::<i8>().wrapping_add(ahead);
            for line in 0..size_of::<L::Word>() {
                _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * line));
            }
        }
        for v in 0..4 {
            let at = k + 16 * v;
            // SAFETY: at + 16 <= x.len() <= stride, and the rows exist.
            unsafe {
                let x = _mm512_loadu_ps(x.as_ptr().add(at));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let w = L::load(weights.add(r * stride + at), __mmask16::MAX);
                    sums[v] = _mm512_fmadd_ps(w, x, sums[v]);
                }
            }
        }
    }
    for v in 0..(x.len() - whole).div_ceil(16) {
        let at = whole + 16 * v;
        let mask = u16::MAX >> (16 - (x.len() - at).min(16));
        // SAFETY: the mask leaves out what is past the end.
        unsafe {
            let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at));
            for (r, sums) in sums.iter_mut().enumerate() {
                let w = L::load(weights.add(r * stride + at), mask);
                // Sums past the end stay as they are, the sign of a zero too.
                sums[v] = _mm512_mask3_fmadd_ps(w, x, sums[v], mask);
            }
        }
    }
    sums.map(|s| fold(s))
}

/// The tree of [`super::fold`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
#[inline]
pub(super) fn fold(sums: [__m512; 4]) -> f32 {
    let sixteen = _mm512_add_ps(_mm512_add_ps(sums[0], sums[2]), _mm512_add_ps(sums[1], sums[3]));
    let upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64::<1>(_mm512_castps_si512(sixteen)));
    let eight = _mm256_add_ps(_mm512_castps512_ps256(sixteen), upper);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
