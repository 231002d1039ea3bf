//! AVX2 with FMA: 6 rows by 16 tokens at a time, or 12 by 8.

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
    for token in (0..width).step_by(16) {
        let take = (width - token).min(16);
        let operands = Operands {
            weights: weights.as_ptr(),
            stride,
            x: x.as_ptr().wrapping_add(token),
            width,
            out: out.as_mut_ptr().wrapping_add(token),
            last: if take > 8 { take - 8 } else { take },
            cols,
        };
        // SAFETY: the caller's promise; token + take <= width.
        unsafe {
            if take > 8 {
                operands.columns::<6, 2>(rows);
            } else {
                operands.columns::<12, 1>(rows);
            }
        }
    }
}

/// Raw parts of the three matrices.
#[derive(Clone, Copy)]
struct Operands {
    weights: *const f32,
    stride: usize,
    x: *const f32,
    width: usize,
    out: *mut f32,
    /// Tokens of the last vector.
    last: usize,
    cols: usize,
}

#[allow(unsafe_code)]
impl Operands {
    /// `V` vectors of tokens, all rows, mostly `R` at a time.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn columns<const R: usize, const V: usize>(self, rows: usize) {
        let mut row = 0;
        while row < rows {
            // SAFETY: rows row .. row + count exist.
            unsafe {
                row += match rows - row {
                    left if left >= R => self.tile::<R, V>(row),
                    4.. => self.tile::<4, V>(row),
                    2.. => self.tile::<2, V>(row),
                    _ => self.tile::<1, V>(row),
                };
            }
        }
    }

    /// `R` rows by `V` vectors; returns `R`.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn tile<const R: usize, const V: usize>(self, row: usize) -> usize {
        let Self { stride, width, .. } = self;
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let last = _mm256_cmpgt_epi32(_mm256_set1_epi32(self.last as i32), lane);
        let mut sums = [[_mm256_setzero_ps(); V]; R];
        // SAFETY: column k has `width` tokens, of which the mask takes those that exist; R rows of `cols` weights.
        unsafe {
            let weights = self.weights.add(row * stride);
            for k in 0..self.cols {
                let mut lanes = [_mm256_setzero_ps(); V];
                for (v, lanes) in lanes.iter_mut().enumerate() {
                    let x = self.x.add(k * width + 8 * v);
                    *lanes = if v + 1 < V { _mm256_loadu_ps(x) } else { _mm256_maskload_ps(x, last) };
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let w = _mm256_set1_ps(*weights.add(r * stride + k));
                    for (sum, lanes) in sums.iter_mut().zip(lanes) {
                        *sum = _mm256_fmadd_ps(w, lanes, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    let out = self.out.add(row * width + r * width + 8 * v);
                    if v + 1 < V {
                        _mm256_storeu_ps(out, *sum);
                    } else {
                        _mm256_maskstore_ps(out, last, *sum);
                    }
                }
            }
        }
        R
    }
}
