//! AVX2: a row at a time, eight columns a byte of kept ones.

use std::arch::x86_64::*;

use crate::cpu::dot::{LANES, ahead, fold};
use crate::cpu::sparse24::codes::avx2::{Bytes, bytes, weights};
use crate::cpu::sparse24::codes::{BLOCK_COLS, BLOCK_KEPT, Grids, SparseCodes};

/// The product of rows from the first on.
///
/// # Safety
/// The processor has AVX2 and FMA; the rows exist, and `x` has a value for each column.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn dot(codes: &SparseCodes, first: usize, x: &[f32], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        if codes.has_offsets() {
            rows::<true>(codes, first, x, out)
        } else {
            rows::<false>(codes, first, x, out)
        }
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const REAL: bool>(codes: &SparseCodes, first: usize, x: &[f32], out: &mut [f32]) {
    let of_block = codes.block_words();
    let (mut grids, mut codes8): (_, Bytes) = (Grids::default(), [0; BLOCK_KEPT + 8]);
    let ahead = ahead(codes.blocks() * of_block, 4);
    for (i, out) in out.iter_mut().enumerate() {
        let (row, mut sums) = (first + i, [0.0f32; LANES]);
        let mut vectors = [_mm256_setzero_ps(); 8];
        codes.grids(row..row + 1, &mut grids);
        for group in 0..codes.groups() {
            let scale = _mm256_set1_ps(grids.scale[group]);
            let zero = _mm256_set1_ps(grids.zero[group]);
            for block in codes.group(group) {
                let words = &codes.row(row)[block * of_block..][..of_block];
                _mm_prefetch::<_MM_HINT_T1>(words.as_ptr().cast::<i8>().wrapping_add(ahead));
                bytes(codes.planes(), words, &mut codes8);
                let x = &x[block * BLOCK_COLS..];
                for (v, vector) in vectors.iter_mut().enumerate() {
                    let kept = (words[v / 4] >> (8 * (v % 4))) as u8;
                    // SAFETY: byte 28 is the last to begin at, of 40; eight values of `x`, or lanes, where there are.
                    unsafe {
                        let weights = weights::<REAL>(codes8.as_ptr().add(4 * v), kept, scale, zero);
                        let left = x.len().saturating_sub(8 * v);
                        if left >= 8 {
                            *vector =
                                _mm256_fmadd_ps(weights, _mm256_loadu_ps(x.as_ptr().add(8 * v)), *vector);
                        } else if left > 0 {
                            // Sums past the end stay as they are, the sign of a zero too.
                            let mut some = ([0.0f32; 8], [0.0f32; 8]);
                            _mm256_storeu_ps(some.0.as_mut_ptr(), weights);
                            _mm256_storeu_ps(some.1.as_mut_ptr(), *vector);
                            for ((sum, weight), x) in some.1.iter_mut().zip(some.0).zip(&x[8 * v..]) {
                                *sum = weight.mul_add(*x, *sum);
                            }
                            *vector = _mm256_loadu_ps(some.1.as_ptr());
                        }
                    }
                }
            }
        }
        for (sums, vector) in sums.chunks_exact_mut(8).zip(vectors) {
            // SAFETY: eight lanes.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), vector) };
        }
        *out = fold(sums);
    }
}
