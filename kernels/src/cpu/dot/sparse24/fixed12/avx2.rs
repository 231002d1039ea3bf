//! AVX2: a tile decoded into the first cache, four values of it spread over eight columns at a time.

use std::arch::x86_64::*;

use llmpress_entropy::fixed12::TILE_COLS;

use super::{BYTE_COLUMNS, Bad};
use crate::cpu::dot::LANES;
use crate::cpu::dot::fixed12::{Tiles, avx2};
use crate::cpu::sparse24::codes::avx2::PLACES;
use crate::cpu::sparse24::{KEPT, QUAD};

/// The product over all strips.
///
/// # Safety
/// The processor has AVX2 and FMA; there are positions for every row of `out`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn dot(tiles: &Tiles<'_>, positions: &[u8], x: &[f32], out: &mut [f32]) -> Result<(), Bad> {
    super::dot_with(
        tiles,
        positions,
        x,
        out,
        |bytes, codes, values| avx2::decode(tiles.base, bytes, codes, values),
        |values, positions, x, sums| add(values, positions, x, sums),
    )
}

/// As [`super::add`], in the same order.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
#[inline]
fn add(values: &[f32; TILE_COLS], positions: &[u8], x: &[f32], sums: &mut [f32; LANES]) {
    let (fours, _) = values.as_chunks::<4>();
    let (eights, rest) = x.as_chunks::<BYTE_COLUMNS>();
    let (sums8, _) = sums.as_chunks_mut::<BYTE_COLUMNS>();
    let mut weights = [0.0f32; BYTE_COLUMNS];
    for (i, (x, byte)) in eights.iter().zip(positions).enumerate() {
        let sum = &mut sums8[i % (LANES / BYTE_COLUMNS)];
        let all = spread(&fours[i], *byte);
        // SAFETY: eight lanes each.
        unsafe {
            let added = _mm256_fmadd_ps(all, _mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(sum.as_ptr()));
            _mm256_storeu_ps(sum.as_mut_ptr(), added);
        }
    }
    if let (false, Some(byte)) = (rest.is_empty(), positions.get(eights.len())) {
        // SAFETY: eight lanes.
        unsafe { _mm256_storeu_ps(weights.as_mut_ptr(), spread(&fours[eights.len()], *byte)) };
        let sum = &mut sums8[eights.len() % (LANES / BYTE_COLUMNS)];
        for ((sum, weight), x) in sum.iter_mut().zip(weights).zip(rest) {
            *sum = weight.mul_add(*x, *sum);
        }
    }
}

/// Four values over the eight columns of a byte of positions.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
#[inline]
fn spread(four: &[f32; 4], byte: u8) -> __m256 {
    let kept = KEPT[usize::from(byte & 15)] | KEPT[usize::from(byte >> 4)] << QUAD;
    // SAFETY: four values, and eight bytes of the table.
    let (values, places) = unsafe {
        let places = _mm_loadl_epi64(PLACES[usize::from(kept)].as_ptr().cast());
        (_mm256_castps128_ps256(_mm_loadu_ps(four.as_ptr())), _mm256_cvtepi8_epi32(places))
    };
    // The highest bit says that there is none.
    let spread = _mm256_permutevar8x32_ps(values, places);
    _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(places))
}
