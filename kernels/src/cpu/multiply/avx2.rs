//! AVX2 with FMA: 6 rows by 16 tokens at a time.

use std::arch::x86_64::*;

/// As [`super::multiply`].
///
/// # Safety
/// The processor has AVX2 and FMA; `x` is whole rows of `width`, `out` too, and `weights` covers the rows of
/// `out`, `stride` apart.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn multiply(weights: &[f32], stride: usize, x: &[f32], width: usize, out: &mut [f32]) {
    let (rows, cols) = (out.len() / width, x.len() / width);
    for row in (0..rows).step_by(6) {
        let count = (rows - row).min(6);
        for token in (0..width).step_by(16) {
            let take = (width - token).min(16);
            // SAFETY: the caller's promise; `count` rows and `take` tokens exist.
            unsafe {
                let (w, y) = (weights.as_ptr().add(row * stride), out.as_mut_ptr().add(row * width + token));
                let x = x.as_ptr().add(token);
                if count == 6 && take == 16 {
                    tile::<6, 2>(w, stride, x, width, cols, 8, y);
                } else {
                    for r in 0..count {
                        let (w, y) = (w.add(r * stride), y.add(r * width));
                        if take > 8 {
                            tile::<1, 2>(w, stride, x, width, cols, take - 8, y);
                        } else {
                            tile::<1, 1>(w, stride, x, width, cols, take, y);
                        }
                    }
                }
            }
        }
    }
}

/// `R` rows by `V` vectors, of which the last has `last` tokens.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn tile<const R: usize, const V: usize>(
    weights: *const f32,
    stride: usize,
    x: *const f32,
    width: usize,
    cols: usize,
    last: usize,
    out: *mut f32,
) {
    let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let mask = |v: usize| {
        let count = if v + 1 == V { last } else { 8 };
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lane)
    };
    let mut sums = [[_mm256_setzero_ps(); V]; R];
    for k in 0..cols {
        let (mut lanes, mut w) = ([_mm256_setzero_ps(); V], [0.0f32; R]);
        // SAFETY: column k has `width` tokens, of which the masks take those that exist; R rows of `cols` weights.
        unsafe {
            for (v, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm256_maskload_ps(x.add(k * width + 8 * v), mask(v));
            }
            for (r, w) in w.iter_mut().enumerate() {
                *w = *weights.add(r * stride + k);
            }
        }
        for (sums, w) in sums.iter_mut().zip(w) {
            let w = _mm256_set1_ps(w);
            for (sum, lanes) in sums.iter_mut().zip(lanes) {
                *sum = _mm256_fmadd_ps(w, lanes, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm256_maskstore_ps(out.add(r * width + 8 * v), mask(v), *sum) };
        }
    }
}
