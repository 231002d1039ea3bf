//! A tile at a time with AVX2: rows `g` and `g + 8` together, because packing their 16-bit lanes to bytes
//! interleaves them exactly as the tile does.
//!
//! ```text
//! row g     [ 8 words | 8 words ]                 two lanes' columns of one half
//! row g + 8 [ 8 words | 8 words ]  -> packus ->   [ 8 bytes g, 8 bytes g + 8 | 8 bytes g, 8 bytes g + 8 ]
//! ```

use std::arch::x86_64::*;

use bytemuck::cast;

use super::{TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

/// Proof that the processor has AVX2.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        crate::isa::has_avx2().then_some(Self(()))
    }

    /// Encodes a tile. Bit `col` of the result's entry `row` marks an escape.
    #[allow(unsafe_code)]
    pub(super) fn encode_tile(
        self,
        base: u16,
        words: &[u16],
        stride: usize,
        sign_mantissa: &mut [u8; TILE_WEIGHTS],
        codes: &mut [u8; TILE_CODE_BYTES],
    ) -> [u64; TILE_ROWS] {
        // SAFETY: `detect`, the only way to a `self`, saw AVX2.
        unsafe { encode_tile(base, words, stride, sign_mantissa, codes) }
    }

    /// Decodes a tile, escapes and padding as if they had codes.
    #[allow(unsafe_code)]
    pub(super) fn decode_tile(
        self,
        base: u16,
        sign_mantissa: &[u8; TILE_WEIGHTS],
        codes: &[u8; TILE_CODE_BYTES],
        words: &mut [u16],
        stride: usize,
    ) {
        // SAFETY: `detect`, the only way to a `self`, saw AVX2.
        unsafe { decode_tile(base, sign_mantissa, codes, words, stride) }
    }
}

/// Within eight codes: even columns first, so that neighbours are the nibbles of one byte.
const EVEN_FIRST: [u8; 32] = [
    0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13,
    15,
];
/// The inverse of [`EVEN_FIRST`].
const INTERLEAVED: [u8; 32] = [
    0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11,
    15,
];

#[target_feature(enable = "avx2")]
fn encode_tile(
    base: u16,
    words: &[u16],
    stride: usize,
    sign_mantissa: &mut [u8; TILE_WEIGHTS],
    codes: &mut [u8; TILE_CODE_BYTES],
) -> [u64; TILE_ROWS] {
    let even_first: __m256i = cast(EVEN_FIRST);
    let base = _mm256_set1_epi16(base.cast_signed());
    let last_code = _mm256_set1_epi16(15);
    // Times 1 and times 16: two nibbles to a byte.
    let nibble_places = _mm256_set1_epi16(0x1001);
    let byte = |w| {
        let sign = _mm256_and_si256(_mm256_srli_epi16::<8>(w), _mm256_set1_epi16(0x80));
        _mm256_or_si256(sign, _mm256_and_si256(w, _mm256_set1_epi16(0x7f)))
    };
    // exponent - sign - base; an arithmetic shift of the sign bit is the subtrahend.
    let key = |w| {
        let exponent = _mm256_srli_epi16::<8>(_mm256_slli_epi16::<1>(w));
        _mm256_sub_epi16(_mm256_add_epi16(exponent, _mm256_srai_epi16::<15>(w)), base)
    };
    let mut masks = [0; TILE_ROWS];
    let (sign_mantissa, _) = sign_mantissa.as_chunks_mut::<32>();
    let (codes, _) = codes.as_chunks_mut::<32>();
    for g in 0..8 {
        let (upper, _) = words[g * stride..][..TILE_COLS].as_chunks::<16>();
        let (lower, _) = words[(g + 8) * stride..][..TILE_COLS].as_chunks::<16>();
        let (mut upper_codes, mut lower_codes) = (0_u64, 0_u64);
        for pair in 0..2 {
            let mut halves = [_mm256_setzero_si256(); 2];
            for (half, packed) in halves.iter_mut().enumerate() {
                let part = 2 * half + pair;
                let (a, b): (__m256i, __m256i) = (cast(upper[part]), cast(lower[part]));
                sign_mantissa[16 * half + 2 * g + pair] = cast(_mm256_packus_epi16(byte(a), byte(b)));
                let (a, b) = (key(a), key(b));
                let a_fits = _mm256_cmpeq_epi16(_mm256_min_epu16(a, last_code), a);
                let b_fits = _mm256_cmpeq_epi16(_mm256_min_epu16(b, last_code), b);
                let fits = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(a_fits, b_fits));
                let fits = _mm256_movemask_epi8(fits).cast_unsigned();
                upper_codes |= u64::from(fits & 0xffff) << (16 * part);
                lower_codes |= u64::from(fits >> 16) << (16 * part);
                let nibbles = _mm256_packus_epi16(_mm256_and_si256(a, a_fits), _mm256_and_si256(b, b_fits));
                *packed = _mm256_maddubs_epi16(_mm256_shuffle_epi8(nibbles, even_first), nibble_places);
            }
            codes[2 * g + pair] = cast(_mm256_packus_epi16(halves[0], halves[1]));
        }
        masks[g] = !upper_codes;
        masks[g + 8] = !lower_codes;
    }
    masks
}

#[target_feature(enable = "avx2")]
fn decode_tile(
    base: u16,
    sign_mantissa: &[u8; TILE_WEIGHTS],
    codes: &[u8; TILE_CODE_BYTES],
    words: &mut [u16],
    stride: usize,
) {
    let interleaved: __m256i = cast(INTERLEAVED);
    let base = _mm256_set1_epi16((base << 7).cast_signed());
    let nibble = _mm256_set1_epi8(15);
    let zero = _mm256_setzero_si256();
    // The byte at bit 0, the code at bit 7 (given at bit 8) and the base at bit 7; the sign on top.
    let word = |byte, code| {
        let sum = _mm256_add_epi16(_mm256_add_epi16(byte, base), _mm256_srli_epi16::<1>(code));
        let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(byte), _mm256_set1_epi16(i16::MIN));
        _mm256_or_si256(sum, sign)
    };
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
                let col = 32 * half + 16 * pair;
                words[g * stride + col..][..16].copy_from_slice(&cast::<_, [u16; 16]>(upper));
                words[(g + 8) * stride + col..][..16].copy_from_slice(&cast::<_, [u16; 16]>(lower));
            }
        }
    }
}
