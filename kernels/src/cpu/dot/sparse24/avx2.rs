//! AVX2: a row at a time, eight columns a byte of positions.

use std::arch::x86_64::*;

use crate::cpu::Elements;
use crate::cpu::dot::{LANES, ahead, fold};
use crate::cpu::sparse24::avx2::spread;
use crate::cpu::sparse24::{KEPT, Sparse24};

/// The product of all rows; whether the positions are right.
///
/// # Safety
/// The processor has AVX2, FMA and F16C; `x` has a value for each column and `out` one for each row.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dot(weights: &Sparse24<'_>, x: &[f32], out: &mut [f32]) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match weights.values() {
            Elements::F32(_) => super::reference(weights, x, out),
            Elements::Bf16(values) => rows::<false>(weights, values, x, out),
            Elements::F16(values) => rows::<true>(weights, values, x, out),
        }
    }
}

/// Rows of words, those of half precision if `HALF`, else of bfloat16.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows<const HALF: bool>(weights: &Sparse24<'_>, values: &[u16], x: &[f32], out: &mut [f32]) -> bool {
    let cols = x.len();
    let whole = cols / LANES * LANES;
    let values_ahead = ahead(cols / 2, 2);
    let mut good = true;
    for (row, out) in out.iter_mut().enumerate() {
        let positions = weights.positions(row);
        let from = row * cols / 2;
        let mut sums = [_mm256_setzero_ps(); 8];
        for k in (0..whole).step_by(LANES) {
            let next = values.as_ptr().wrapping_add(from + k / 2).cast::<i8>().wrapping_add(values_ahead);
            _mm_prefetch::<_MM_HINT_T1>(next);
            for (v, (sum, &byte)) in sums.iter_mut().zip(&positions[k / 8..k / 8 + 8]).enumerate() {
                // SAFETY: a row has `cols / 2` values, of which eight columns have four.
                unsafe {
                    let words = spread(values.as_ptr().add(from + k / 2 + 4 * v), byte);
                    let w = if HALF {
                        _mm256_cvtph_ps(words)
                    } else {
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
                    };
                    *sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.as_ptr().add(k + 8 * v)), *sum);
                }
                good &= KEPT[usize::from(byte & 15)] != 0 && KEPT[usize::from(byte >> 4)] != 0;
            }
        }
        let mut lanes = [0.0f32; LANES];
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: eight lanes of 64.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr().add(8 * v), *sum) };
        }
        let mut next = from + whole / 2;
        for ((i, x), (kept, right)) in x[whole..].chunks(8).enumerate().zip(weights.kept(row).skip(whole / 8))
        {
            good &= right;
            for (j, x) in x.iter().enumerate() {
                let mut weight = 0.0;
                if kept >> j & 1 == 1 {
                    let values = weights.values();
                    // Positions that are wrong keep fewer, never more.
                    weight = values.get(next);
                    next += 1;
                }
                let sum = &mut lanes[8 * i + j];
                *sum = weight.mul_add(*x, *sum);
            }
        }
        *out = fold(lanes);
    }
    good
}
