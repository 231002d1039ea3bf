//! AVX-512: 8 rows by 48 tokens at a time.

use std::arch::x86_64::*;

/// As [`super::multiply`].
///
/// # Safety
/// The processor has AVX-512F; `x` is whole rows of `width`, `out` too, and `weights` covers the rows of `out`,
/// `stride` apart.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply(weights: &[f32], stride: usize, x: &[f32], width: usize, out: &mut [f32]) {
    let (rows, cols) = (out.len() / width, x.len() / width);
    let mut token = 0;
    while token < width {
        let take = (width - token).min(48);
        let last = u16::MAX >> (15 - (take - 1) % 16);
        let block = match take.div_ceil(16) {
            1 => columns::<1>,
            2 => columns::<2>,
            _ => columns::<3>,
        };
        // SAFETY: the caller's promise; token + take <= width.
        unsafe {
            block(
                weights.as_ptr(),
                stride,
                x.as_ptr().add(token),
                width,
                rows,
                cols,
                last,
                out.as_mut_ptr().add(token),
            );
        }
        token += take;
    }
}

/// `V` vectors of tokens, all rows.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
#[expect(clippy::too_many_arguments, reason = "raw parts of three matrices")]
unsafe fn columns<const V: usize>(
    weights: *const f32,
    stride: usize,
    x: *const f32,
    width: usize,
    rows: usize,
    cols: usize,
    last: __mmask16,
    out: *mut f32,
) {
    let mut row = 0;
    while row < rows {
        // SAFETY: rows row .. row + R exist.
        unsafe {
            let (w, y) = (weights.add(row * stride), out.add(row * width));
            row += match rows - row {
                8.. => tile::<8, V>(w, stride, x, width, cols, last, y),
                4.. => tile::<4, V>(w, stride, x, width, cols, last, y),
                2.. => tile::<2, V>(w, stride, x, width, cols, last, y),
                _ => tile::<1, V>(w, stride, x, width, cols, last, y),
            };
        }
    }
}

/// `R` rows by `V` vectors; returns `R`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn tile<const R: usize, const V: usize>(
    weights: *const f32,
    stride: usize,
    x: *const f32,
    width: usize,
    cols: usize,
    last: __mmask16,
    out: *mut f32,
) -> usize {
    let mask = |v: usize| if v + 1 == V { last } else { __mmask16::MAX };
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for k in 0..cols {
        let (mut lanes, mut w) = ([_mm512_setzero_ps(); V], [0.0f32; R]);
        // SAFETY: column k has `width` tokens, of which the masks take those that exist; R rows of `cols` weights.
        unsafe {
            for (v, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_maskz_loadu_ps(mask(v), x.add(k * width + 16 * v));
            }
            for (r, w) in w.iter_mut().enumerate() {
                *w = *weights.add(r * stride + k);
            }
        }
        for (sums, w) in sums.iter_mut().zip(w) {
            let w = _mm512_set1_ps(w);
            for (sum, lanes) in sums.iter_mut().zip(lanes) {
                *sum = _mm512_fmadd_ps(w, lanes, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm512_mask_storeu_ps(out.add(r * width + 16 * v), mask(v), *sum) };
        }
    }
    R
}
