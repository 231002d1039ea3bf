//! fixed12 with AVX-512 and VBMI, a tile at a time.
//!
//! ```text
//! sign_mantissa bytes --permute--> bits 31, 23..16 of 16 words --+
//!                                                                 +--add--> 16 weights in single precision
//! codes --permute, shift--> 4 bits --table--> (code + base) << 23 +
//! ```
//!
//! The sign, which the byte also carries at bit 23, adds the one that its code lacks.

use std::arch::x86_64::*;

use llmpress_entropy::fixed12::{StripsRef, TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

use super::avx512::fold;

/// The sums of a strip's rows.
type Sums = [[__m512; 4]; TILE_ROWS];

/// [`super::dot_fixed12`] of one strip.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VBMI; the components have the sizes that `x.len()` gives, offsets
/// ascend and escape positions lie in their tile.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,f16c")]
pub(super) unsafe fn dot_strip(base: i16, strip: &StripsRef<'_>, x: &[f32], out: &mut [f32]) {
    let tables = Tables::new(base);
    let mut sums: Sums = [[_mm512_setzero_ps(); 4]; TILE_ROWS];
    let (bytes, _) = strip.sign_mantissa.as_chunks::<TILE_WEIGHTS>();
    let (codes, _) = strip.codes.as_chunks::<TILE_CODE_BYTES>();
    let first = strip.escape_offsets[0];
    for (tile, (bytes, codes)) in bytes.iter().zip(codes).enumerate() {
        let escapes =
            (strip.escape_offsets[tile] - first) as usize..(strip.escape_offsets[tile + 1] - first) as usize;
        let x = &x[tile * TILE_COLS..];
        let mut masks = [__mmask16::MAX; 4];
        let mut lanes = [_mm512_setzero_ps(); 4];
        for v in 0..4 {
            let left = x.len().saturating_sub(16 * v).min(16);
            masks[v] = ((1u32 << left) - 1) as u16;
            // SAFETY: the mask leaves out what is past the end.
            lanes[v] = unsafe { _mm512_maskz_loadu_ps(masks[v], x.as_ptr().wrapping_add(16 * v)) };
        }
        if escapes.is_empty() && x.len() >= TILE_COLS {
            for g in 0..8 {
                let rows = tables.rows(bytes, codes, g);
                for (row, weights) in [g, g + 8].into_iter().zip(rows) {
                    for v in 0..4 {
                        sums[row][v] = _mm512_fmadd_ps(weights[v], lanes[v], sums[row][v]);
                    }
                }
            }
            continue;
        }
        let mut weights = [[0u32; TILE_COLS]; TILE_ROWS];
        for g in 0..8 {
            let rows = tables.rows(bytes, codes, g);
            for (row, decoded) in [g, g + 8].into_iter().zip(rows) {
                for v in 0..4 {
                    let to = weights[row][16 * v..16 * v + 16].as_mut_ptr();
                    // SAFETY: sixteen words.
                    unsafe { _mm512_storeu_ps(to.cast(), decoded[v]) };
                }
            }
        }
        let flat = weights.as_flattened_mut();
        let escapes = strip.escape_positions[escapes.clone()].iter().zip(&strip.escape_exponents[escapes]);
        for (&position, &exponent) in escapes {
            let weight = &mut flat[usize::from(position) % TILE_WEIGHTS];
            *weight = *weight & 0x807f_0000 | u32::from(exponent) << 23;
        }
        for (weights, sums) in weights.iter().zip(&mut sums) {
            for v in 0..4 {
                // SAFETY: sixteen words.
                let weights = unsafe { _mm512_loadu_ps(weights[16 * v..16 * v + 16].as_ptr().cast()) };
                sums[v] = _mm512_mask3_fmadd_ps(weights, lanes[v], sums[v], masks[v]);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        *out = fold(sums);
    }
}

/// The operands of the permutations.
struct Tables {
    /// `(code + base) << 23`.
    exponents: __m512i,
    /// For a row and a half of its 32 columns in the half-tile: where the bytes come from.
    bytes: [[__m512i; 2]; 2],
    /// For a row and a vector: which words its codes are in.
    words: [[__m512i; 4]; 2],
    /// How far a column's code is from bit 0 of its word.
    shifts: __m512i,
}

impl Tables {
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
    fn new(base: i16) -> Self {
        let load = |table: [i32; 16]| {
            // SAFETY: sixteen words.
            unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
        };
        let words = |f: &dyn Fn(usize) -> usize| load(std::array::from_fn(|i| f(i) as i32));
        // Lane 4 g + q of a half-tile holds 8 bytes of row g, then 8 of row g + 8.
        let source = |row: usize, vector: usize, i: usize| 16 * (2 * vector + i / 8) + 8 * row + i % 8;
        Self {
            exponents: words(&|code| (code + base.unsigned_abs() as usize) << 23),
            bytes: [0, 1]
                .map(|row| [0, 1].map(|v| words(&|i| source(row, v, i) << 16 | source(row, v, i) << 24))),
            words: [0, 1]
                .map(|row| [0, 1, 2, 3].map(|v| words(&|i| 4 * (2 * (v % 2) + i / 8) + 2 * (v / 2) + row))),
            shifts: words(&|i| 4 * (i % 8 / 2) + 16 * (i % 2)),
        }
    }

    /// Rows `g` and `g + 8` of a tile, in vectors of 16 columns, as if nothing were an escape.
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
    #[inline]
    fn rows(&self, bytes: &[u8; TILE_WEIGHTS], codes: &[u8; TILE_CODE_BYTES], g: usize) -> [[__m512; 4]; 2] {
        // SAFETY: 64 bytes each, g < 8.
        let (halves, codes) = unsafe {
            (
                [0, 512].map(|half| _mm512_loadu_si512(bytes[half + 64 * g..][..64].as_ptr().cast())),
                _mm512_loadu_si512(codes[64 * g..][..64].as_ptr().cast()),
            )
        };
        let fields = _mm512_set1_epi32(0x80ff_0000_u32 as i32);
        let mut rows = [[_mm512_setzero_ps(); 4]; 2];
        for (row, weights) in rows.iter_mut().enumerate() {
            for (v, weights) in weights.iter_mut().enumerate() {
                let sign_mantissa =
                    _mm512_and_si512(_mm512_permutexvar_epi8(self.bytes[row][v % 2], halves[v / 2]), fields);
                let code =
                    _mm512_srlv_epi32(_mm512_permutexvar_epi32(self.words[row][v], codes), self.shifts);
                // The table look-up takes the low four bits of each word.
                let exponent = _mm512_permutexvar_epi32(code, self.exponents);
                *weights = _mm512_castsi512_ps(_mm512_add_epi32(sign_mantissa, exponent));
            }
        }
        rows
    }
}
