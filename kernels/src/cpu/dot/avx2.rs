//! AVX2 with FMA and F16C: a row at a time, its 64 sums in eight vectors.

use std::arch::x86_64::*;

use super::{LANES, ahead, fold};
use crate::cpu::Elements;

/// As [`super::dot_rows`].
///
/// # Safety
/// The processor has AVX2, FMA and F16C; `weights` covers the rows of `out`, `stride` apart.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dot_rows(weights: Elements<'_>, stride: usize, x: &[f32], out: &mut [f32]) {
    let bytes = if matches!(weights, Elements::F32(_)) { 4 } else { 2 };
    let ahead = ahead(stride, bytes);
    for (r, out) in out.iter_mut().enumerate() {
        let at = r * stride;
        let row = match weights {
            Elements::F32(w) => Elements::F32(&w[at..at + x.len()]),
            Elements::Bf16(w) => Elements::Bf16(&w[at..at + x.len()]),
            Elements::F16(w) => Elements::F16(&w[at..at + x.len()]),
        };
        // SAFETY: the row is as long as `x`.
        *out = unsafe { dot(row, x, ahead) };
    }
}

/// One row as long as `x`; what lies some bytes ahead is brought into the second cache.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot(row: Elements<'_>, x: &[f32], ahead: usize) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 8];
    let whole = x.len() / LANES * LANES;
    for k in (0..whole).step_by(LANES) {
        let (next, bytes): (*const i8, _) = match row {
            Elements::F32(w) => (w.as_ptr().wrapping_add(k).cast(), 4),
            Elements::Bf16(w) | Elements::F16(w) => (w.as_ptr().wrapping_add(k).cast(), 2),
        };
        for line in 0..bytes {
            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(ahead).wrapping_add(64 * line));
        }
        for (v, sum) in sums.iter_mut().enumerate() {
            let at = k + 8 * v;
            // SAFETY: at + 8 <= the row's length.
            unsafe {
                let w = match row {
                    Elements::F32(w) => _mm256_loadu_ps(w.as_ptr().add(at)),
                    Elements::Bf16(w) => {
                        let words = _mm_loadu_si128(w.as_ptr().add(at).cast());
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
                    }
                    Elements::F16(w) => _mm256_cvtph_ps(_mm_loadu_si128(w.as_ptr().add(at).cast())),
                };
                *sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.as_ptr().add(at)), *sum);
            }
        }
    }
    let mut lanes = [0.0f32; LANES];
    for (v, sum) in sums.iter().enumerate() {
        // SAFETY: eight lanes of 64.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr().add(8 * v), *sum) };
    }
    for (k, &x) in x.iter().enumerate().skip(whole) {
        lanes[k % LANES] = row.get(k).mul_add(x, lanes[k % LANES]);
    }
    fold(lanes)
}
