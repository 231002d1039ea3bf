//! AVX-512: 8 rows by 48 tokens at a time, or more rows by fewer tokens.

use std::arch::x86_64::*;

/// Columns from those that are multiplied to those asked of memory.
const AHEAD: usize = 32;

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
        let operands = Operands {
            weights: weights.as_ptr(),
            stride,
            x: x.as_ptr().wrapping_add(token),
            width,
            out: out.as_mut_ptr().wrapping_add(token),
            last: u16::MAX >> (15 - (take - 1) % 16),
        };
        // SAFETY: the caller's promise; token + take <= width.
        unsafe {
            // As many sums as fill the registers.
            match take.div_ceil(16) {
                1 => operands.columns::<16, 1>(rows, cols),
                2 => operands.columns::<12, 2>(rows, cols),
                _ => operands.columns::<8, 3>(rows, cols),
            }
        }
        token += take;
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
    /// Which lanes of the last vector are tokens.
    last: __mmask16,
}

#[allow(unsafe_code)]
impl Operands {
    /// `V` vectors of tokens, all rows, mostly `R` at a time.
    #[target_feature(enable = "avx512f")]
    unsafe fn columns<const R: usize, const V: usize>(self, rows: usize, cols: usize) {
        let mut row = 0;
        while row < rows {
            // SAFETY: rows row .. row + count exist.
            unsafe {
                row += match rows - row {
                    left if left >= R => self.tile::<R, V>(row, cols),
                    8.. => self.tile::<8, V>(row, cols),
                    4.. => self.tile::<4, V>(row, cols),
                    2.. => self.tile::<2, V>(row, cols),
                    _ => self.tile::<1, V>(row, cols),
                };
            }
        }
    }

    /// `R` rows by `V` vectors; returns `R`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn tile<const R: usize, const V: usize>(self, row: usize, cols: usize) -> usize {
        let Self { stride, width, .. } = self;
        let mask = |v: usize| if v + 1 == V { self.last } else { __mmask16::MAX };
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        // SAFETY: column k has `width` tokens, of which the masks take those that exist; R rows of `cols` weights.
        unsafe {
            let weights = self.weights.add(row * stride);
            let out = self.out.add(row * width);
            for k in 0..cols {
                // The other panels have driven this one out of the nearer caches.
                for v in 0..V {
                    let x = self.x.wrapping_add((k + AHEAD) * width + 16 * v);
                    _mm_prefetch::<_MM_HINT_T0>(x.cast());
                }
                let mut lanes = [_mm512_setzero_ps(); V];
                for (v, lanes) in lanes.iter_mut().enumerate() {
                    *lanes = _mm512_maskz_loadu_ps(mask(v), self.x.add(k * width + 16 * v));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let w = _mm512_set1_ps(*weights.add(r * stride + k));
                    for (sum, lanes) in sums.iter_mut().zip(lanes) {
                        *sum = _mm512_fmadd_ps(w, lanes, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    _mm512_mask_storeu_ps(out.add(r * width + 16 * v), mask(v), *sum);
                }
            }
        }
        R
    }
}
