//! AVX-512 with VBMI, a tile at a time.
//!
//! ```text
//! sign_mantissa bytes --permute--> bits 31, 23..16 of 16 words --+
//!                                                                 +--add--> 16 weights in single precision
//! codes --permute, shift--> 4 bits --table--> (code + base) << 23 +
//! ```
//!
//! The sign, which the byte also carries at bit 23, adds the one that its code lacks. Exponents of escapes lie in
//! a tile's worth of words that are else zero, and replace those of the weights at the same places.

use std::arch::x86_64::*;

use llmpress_entropy::fixed12::{TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

use super::{BadEscapes, Tiles};
use crate::cpu::dot::avx512::fold;

/// Tiles from the one that is multiplied to those asked of memory.
const AHEAD: usize = 8;

/// The sums of a strip's rows.
type Sums = [[__m512; 4]; TILE_ROWS];
/// For each weight of a tile 0, or [`MARK`] and the exponent of an escape in its place.
type Patches = [u32; TILE_WEIGHTS];

const MARK: i32 = 1;

/// The product over all strips.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VBMI.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,f16c")]
pub(super) unsafe fn dot(tiles: &Tiles<'_>, x: &[f32], out: &mut [f32]) -> Result<(), BadEscapes> {
    let tables = Tables::new(tiles.base);
    // Two, so that a tile's patches are long written when they are read: a load across younger stores stalls.
    let mut patches: [Patches; 2] = [[0; TILE_WEIGHTS]; 2];
    list(tiles, 0, &mut patches[0])?;
    let mut tile = 0;
    for out in out.chunks_mut(TILE_ROWS) {
        let mut sums: Sums = [[_mm512_setzero_ps(); 4]; TILE_ROWS];
        for x in x.chunks(TILE_COLS) {
            let [even, odd] = &mut patches;
            let (now, next) = if tile % 2 == 0 { (even, odd) } else { (odd, even) };
            list(tiles, tile + 1, next)?;
            let (bytes, codes) = (&tiles.sign_mantissa[tile], &tiles.codes[tile]);
            let escapes = tiles.escapes(tile).0;
            if escapes.is_empty() {
                add::<false>(&tables, bytes, codes, now, x, &mut sums);
            } else {
                add::<true>(&tables, bytes, codes, now, x, &mut sums);
                clear(escapes, now);
            }
            tile += 1;
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            *out = fold(sums);
        }
    }
    Ok(())
}

/// Adds a tile's products. Its columns past `x` are padding.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
#[inline]
fn add<const ESCAPES: bool>(
    tables: &Tables,
    bytes: &[u8; TILE_WEIGHTS],
    codes: &[u8; TILE_CODE_BYTES],
    patches: &Patches,
    x: &[f32],
    sums: &mut Sums,
) {
    let mut masks = [__mmask16::MAX; 4];
    let mut lanes = [_mm512_setzero_ps(); 4];
    for v in 0..4 {
        masks[v] = first_lanes(x.len().saturating_sub(16 * v));
        // SAFETY: the mask leaves out what is past the end.
        lanes[v] = unsafe { _mm512_maskz_loadu_ps(masks[v], x.as_ptr().wrapping_add(16 * v)) };
    }
    let (patches, _) = patches.as_chunks::<16>();
    for g in 0..8 {
        for (start, bytes_of_g) in [
            (bytes.as_ptr().wrapping_add(64 * g), TILE_WEIGHTS),
            (bytes.as_ptr().wrapping_add(TILE_WEIGHTS / 2 + 64 * g), TILE_WEIGHTS),
            (codes.as_ptr().wrapping_add(64 * g), TILE_CODE_BYTES),
        ] {
            _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(AHEAD * bytes_of_g).cast());
        }
        let rows = tables.rows(bytes, codes, g);
        for (row, weights) in [g, g + 8].into_iter().zip(rows) {
            for v in 0..4 {
                let mut weight = weights[v];
                if ESCAPES {
                    weight = patch(weight, &patches[4 * row + v]);
                }
                // Sums past the end stay as they are, the sign of a zero too.
                sums[row][v] = _mm512_mask3_fmadd_ps(weight, lanes[v], sums[row][v], masks[v]);
            }
        }
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
#[inline]
fn patch(weights: __m512, patches: &[u32; 16]) -> __m512 {
    // SAFETY: sixteen words.
    let patches = unsafe { _mm512_loadu_si512(patches.as_ptr().cast()) };
    let weights = _mm512_castps_si512(weights);
    let fields = _mm512_set1_epi32(0x807f_ffff_u32 as i32);
    // Bits of the first where those of the third are set, else of the second.
    const SELECT: i32 = 0b1110_0100;
    let patched = _mm512_mask_ternarylogic_epi32::<{ SELECT }>(
        weights,
        _mm512_test_epi32_mask(patches, patches),
        patches,
        fields,
    );
    _mm512_castsi512_ps(patched)
}

/// The lowest `count` lanes, or all.
fn first_lanes(count: usize) -> __mmask16 {
    if count < 16 { (1 << count) - 1 } else { __mmask16::MAX }
}

/// Writes the escapes of `tile`, if there is such a tile, into `patches`, which are zero before.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn list(tiles: &Tiles<'_>, tile: usize, patches: &mut Patches) -> Result<(), BadEscapes> {
    let (positions, exponents) = tiles.escapes(tile);
    if positions.is_empty() {
        return Ok(());
    }
    let (rows, cols) = tiles.extent(tile);
    let (rows, cols) = (_mm512_set1_epi32(rows as i32), _mm512_set1_epi32(cols as i32));
    let mut last = _mm512_set1_epi32(-1);
    for first in (0..positions.len()).step_by(16) {
        let mask = first_lanes(positions.len() - first);
        // SAFETY: the mask leaves out what is past the ends, which are the same.
        let (positions, exponents) = unsafe {
            (
                _mm256_maskz_loadu_epi16(mask, positions[first..].as_ptr().cast()),
                _mm_maskz_loadu_epi8(mask, exponents[first..].as_ptr().cast()),
            )
        };
        let (positions, exponents) = (_mm512_cvtepu16_epi32(positions), _mm512_cvtepu8_epi32(exponents));
        // Each position beside the one before it.
        let before = _mm512_alignr_epi32::<15>(positions, last);
        last = positions;
        let row = _mm512_srli_epi32::<6>(positions);
        let col = _mm512_and_si512(positions, _mm512_set1_epi32(TILE_COLS as i32 - 1));
        let good = _mm512_mask_cmplt_epi32_mask(mask, before, positions);
        let good = _mm512_mask_cmplt_epi32_mask(good, row, rows);
        if _mm512_mask_cmplt_epi32_mask(good, col, cols) != mask {
            return Err(BadEscapes { tile });
        }
        let words = _mm512_or_si512(_mm512_slli_epi32::<23>(exponents), _mm512_set1_epi32(MARK));
        // SAFETY: rows are at most 16 and columns 64, so every position is less than 1024.
        unsafe { _mm512_mask_i32scatter_epi32::<4>(patches.as_mut_ptr().cast(), mask, positions, words) };
    }
    Ok(())
}

/// Makes `patches` zero again.
#[inline]
fn clear(positions: &[u16], patches: &mut Patches) {
    for &position in positions {
        patches[usize::from(position) % TILE_WEIGHTS] = 0;
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
    fn new(base: u32) -> Self {
        let load = |table: [i32; 16]| {
            // SAFETY: sixteen words.
            unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
        };
        let words = |f: &dyn Fn(usize) -> usize| load(std::array::from_fn(|i| f(i) as i32));
        // Lane 4 g + q of a half-tile holds 8 bytes of row g, then 8 of row g + 8.
        let source = |row: usize, vector: usize, i: usize| 16 * (2 * vector + i / 8) + 8 * row + i % 8;
        Self {
            exponents: words(&|code| (code + base as usize) << 23),
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
