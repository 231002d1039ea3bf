//! AVX-512: four rows at a time, 64 columns each.

use std::arch::x86_64::*;

use crate::cpu::Elements;
use crate::cpu::dot::by_parity::{self, by_parity};
use crate::cpu::dot::{ahead, avx512};
use crate::cpu::sparse24::Sparse24;
use crate::cpu::sparse24::avx512::{Half, Kept, STEP, Single, Spread, expand, kept};

/// The product of all rows; whether the positions are right.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VBMI2; `x` has a value for each column and `out` one for each row.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
pub(super) unsafe fn dot(weights: &Sparse24<'_>, x: &[f32], out: &mut [f32]) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match weights.values() {
            Elements::F32(values) => all::<InOrder<Single>>(weights, values.as_ptr(), x, out),
            Elements::Bf16(values) => all::<ByParity>(weights, values.as_ptr(), x, out),
            Elements::F16(values) => all::<InOrder<Half>>(weights, values.as_ptr(), x, out),
        }
    }
}

/// In what order 64 columns lie in four vectors.
trait Order {
    type Word: Copy;

    /// 64 weights, of which the values of those kept lie at `from`.
    ///
    /// # Safety
    /// The processor has the features; 32 values, or as many as `count`, can be read.
    #[allow(unsafe_code)]
    unsafe fn weights(from: *const Self::Word, count: usize, kept: u64) -> [__m512; 4];

    /// Up to 64 values of `x`, and which lanes are values.
    ///
    /// # Safety
    /// The processor has the features.
    #[allow(unsafe_code)]
    unsafe fn x(x: &[f32]) -> ([__m512; 4], [__mmask16; 4]);

    /// The tree that ends a product.
    ///
    /// # Safety
    /// The processor has the features.
    #[allow(unsafe_code)]
    unsafe fn fold(sums: [__m512; 4]) -> f32;
}

struct InOrder<S>(S);

#[allow(unsafe_code)]
impl<S: Spread> Order for InOrder<S> {
    type Word = S::Word;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
    #[inline]
    unsafe fn weights(from: *const S::Word, count: usize, kept: u64) -> [__m512; 4] {
        // SAFETY: the caller's promise.
        unsafe { S::spread(from, count, kept) }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn x(x: &[f32]) -> ([__m512; 4], [__mmask16; 4]) {
        let masks = std::array::from_fn(|v| by_parity::first_lanes(x.len().saturating_sub(16 * v)));
        // SAFETY: the masks leave out what is past the end.
        let load = |v| unsafe { _mm512_maskz_loadu_ps(masks[v], x.as_ptr().wrapping_add(16 * v)) };
        (std::array::from_fn(load), masks)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    #[inline]
    unsafe fn fold(sums: [__m512; 4]) -> f32 {
        avx512::fold(sums)
    }
}

/// Words of bfloat16, of which a vector has two in each lane: half the instructions that widening them in order takes.
struct ByParity;

#[allow(unsafe_code)]
impl Order for ByParity {
    type Word = u16;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
    #[inline]
    unsafe fn weights(from: *const u16, count: usize, kept: u64) -> [__m512; 4] {
        // SAFETY: the caller's promise.
        let words = unsafe { expand(from, count, kept) };
        let even = words.map(|w| _mm512_slli_epi32::<16>(w));
        let odd = words.map(|w| _mm512_and_si512(w, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
        [even[0], odd[0], even[1], odd[1]].map(|w| _mm512_castsi512_ps(w))
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn x(x: &[f32]) -> ([__m512; 4], [__mmask16; 4]) {
        by_parity(x)
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn fold(sums: [__m512; 4]) -> f32 {
        by_parity::fold(sums)
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
unsafe fn all<O: Order>(weights: &Sparse24<'_>, values: *const O::Word, x: &[f32], out: &mut [f32]) -> bool {
    // SAFETY: the processor has the features.
    let x: Vec<([__m512; 4], [__mmask16; 4])> = x.chunks(64).map(|x| unsafe { O::x(x) }).collect();
    let (mut row, mut good) = (0, true);
    while row < out.len() {
        // SAFETY: rows row .. row + R exist.
        unsafe {
            if out.len() - row >= 4 {
                let (sums, right) = rows::<O, 4>(weights, row, values, &x);
                out[row..row + 4].copy_from_slice(&sums);
                (row, good) = (row + 4, good && right);
            } else {
                let ([sum], right) = rows::<O, 1>(weights, row, values, &x);
                out[row] = sum;
                (row, good) = (row + 1, good && right);
            }
        }
    }
    good
}

/// `R` rows. What lies `R` rows on, or a multiple of that, is brought into the second cache.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,f16c")]
#[inline]
unsafe fn rows<O: Order, const R: usize>(
    weights: &Sparse24<'_>,
    row: usize,
    values: *const O::Word,
    x: &[([__m512; 4], [__mmask16; 4])],
) -> ([f32; R], bool) {
    let mut sums = [[_mm512_setzero_ps(); 4]; R];
    let mut bits: [Kept; R] = [[0; STEP / 64]; R];
    let (cols, mut good) = (weights.cols(), true);
    let values_ahead = ahead(R.saturating_mul(cols / 2), size_of::<O::Word>());
    let positions_ahead = ahead(R.saturating_mul(cols.div_ceil(8)), 1);
    for (part, x) in x.chunks(STEP / 64).enumerate() {
        let first = part * STEP;
        for (r, bits) in bits.iter_mut().enumerate() {
            let positions = &weights.positions(row + r)[first / 8..];
            _mm_prefetch::<_MM_HINT_T1>(positions.as_ptr().wrapping_add(positions_ahead).cast());
            // SAFETY: the processor has it.
            good &= unsafe { kept(positions, cols - first, bits) };
        }
        for (i, (x, masks)) in x.iter().enumerate() {
            let k = first + 64 * i;
            let left = cols - k;
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: a row has `cols / 2` values; what is past the end is neither read nor added.
                unsafe {
                    let from = values.add(((row + r) * cols + k) / 2);
                    if left >= 64 {
                        let next = from.cast::<i8>().wrapping_add(values_ahead);
                        for line in 0..size_of::<O::Word>() / 2 {
                            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * line));
                        }
                        let weights = O::weights(from, 32, bits[r][i]);
                        for ((sum, w), x) in sums.iter_mut().zip(weights).zip(x) {
                            *sum = _mm512_fmadd_ps(w, *x, *sum);
                        }
                    } else {
                        let weights = O::weights(from, left / 2, bits[r][i]);
                        for v in 0..4 {
                            // Sums past the end stay as they are, the sign of a zero too.
                            sums[v] = _mm512_mask3_fmadd_ps(weights[v], x[v], sums[v], masks[v]);
                        }
                    }
                }
            }
        }
    }
    // SAFETY: the processor has the features.
    (sums.map(|sums| unsafe { O::fold(sums) }), good)
}
