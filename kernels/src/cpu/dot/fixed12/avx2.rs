//! AVX2: tiles decoded as words of bfloat16, as `llmpress_entropy::fixed12` does, and widened.

use std::arch::x86_64::*;

use bytemuck::cast;
use llmpress_entropy::fixed12::{TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

use super::{BadEscapes, Tiles, plain};

/// The product over all strips.
///
/// # Safety
/// The processor has AVX2 and FMA.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn dot(tiles: &Tiles<'_>, x: &[f32], out: &mut [f32]) -> Result<(), BadEscapes> {
    plain::dot_with(tiles, x, out, |bytes, codes, weights| decode(tiles.base, bytes, codes, weights))
}

/// Columns of eight in their order, from even ones and then odd ones.
const INTERLEAVED: [u8; 32] = [
    0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11,
    15,
];

/// As [`plain::decode`].
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(in crate::cpu::dot) fn decode(
    base: u32,
    sign_mantissa: &[u8; TILE_WEIGHTS],
    codes: &[u8; TILE_CODE_BYTES],
    weights: &mut [[f32; TILE_COLS]; TILE_ROWS],
) {
    let interleaved: __m256i = cast(INTERLEAVED);
    let base = _mm256_set1_epi16((base << 7) as i16);
    let nibble = _mm256_set1_epi8(15);
    let zero = _mm256_setzero_si256();
    // The byte at bit 0, the code at bit 7 (given at bit 8) and the base at bit 7; the sign on top.
    let word = |byte, code| {
        let sum = _mm256_add_epi16(_mm256_add_epi16(byte, base), _mm256_srli_epi16::<1>(code));
        let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(byte), _mm256_set1_epi16(i16::MIN));
        _mm256_or_si256(sum, sign)
    };
    let single = |words| -> [f32; 8] { cast(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words))) };
    let (sign_mantissa, _) = sign_mantissa.as_chunks::<32>();
    let (codes, _) = codes.as_chunks::<32>();
    for g in 0..8 {
        for pair in 0..2 {
            let packed: __m256i = cast(codes[2 * g + pair]);
            let even = _mm256_and_si256(packed, nibble);
            let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), nibble);
            let halves = [_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)];
            for (half, codes) in halves.into_iter().enumerate() {
                let codes = _mm256_shuffle_epi8(codes, interleaved);
                let bytes: __m256i = cast(sign_mantissa[16 * half + 2 * g + pair]);
                let upper = word(_mm256_unpacklo_epi8(bytes, zero), _mm256_unpacklo_epi8(zero, codes));
                let lower = word(_mm256_unpackhi_epi8(bytes, zero), _mm256_unpackhi_epi8(zero, codes));
                let part = 4 * half + 2 * pair;
                for (row, words) in [(g, upper), (g + 8, lower)] {
                    let (weights, _) = weights[row].as_chunks_mut::<8>();
                    weights[part] = single(_mm256_castsi256_si128(words));
                    weights[part + 1] = single(_mm256_extracti128_si256::<1>(words));
                }
            }
        }
    }
}
