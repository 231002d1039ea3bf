//! AVX-512 with VBMI and VBMI2: half a row of a tile at a time, 32 words of bfloat16 that are spread over 64 columns.

use std::arch::x86_64::*;

use llmpress_entropy::fixed12::{TILE_CODE_BYTES, TILE_ROWS, TILE_WEIGHTS};

use super::{BYTE_COLUMNS, Bad};
use crate::cpu::dot::by_parity::{by_parity, fold};
use crate::cpu::dot::fixed12::Tiles;
use crate::cpu::dot::fixed12::avx512::{AHEAD, Decoder, Patches, Sums, Workspace, list};
use crate::cpu::sparse24::avx512::{Kept, STEP, kept};

/// Tiles whose positions are read at once.
const STEP_TILES: usize = STEP / super::TILE_SPAN;

/// 64 columns, even and odd ones of each half apart, and which of them exist.
type Columns = ([__m512; 4], [__mmask16; 4]);

/// The product over all strips.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL, VBMI and VBMI2; there are positions for every row of `out`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,f16c")]
pub(super) unsafe fn dot(tiles: &Tiles<'_>, positions: &[u8], x: &[f32], out: &mut [f32]) -> Result<(), Bad> {
    if tiles.base.is_multiple_of(2) {
        strips::<false>(tiles, positions, x, out)
    } else {
        strips::<true>(tiles, positions, x, out)
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,f16c")]
#[allow(unsafe_code)]
fn strips<const ODD: bool>(
    tiles: &Tiles<'_>,
    positions: &[u8],
    x: &[f32],
    out: &mut [f32],
) -> Result<(), Bad> {
    let (cols, of_row) = (x.len(), x.len().div_ceil(BYTE_COLUMNS));
    // A tile has two parts, of which the last may lack the second: no columns, and nothing is added.
    let mut columns: Vec<Columns> = x.chunks(64).map(|x| by_parity(x)).collect();
    if !columns.len().is_multiple_of(2) {
        columns.push(by_parity(&[]));
    }
    let decoder = Decoder::<ODD>::new(tiles.base);
    let zero = [[_mm512_setzero_ps(); 4]; TILE_ROWS];
    let mut workspace = Workspace::new();
    let Workspace { sums, patches: [even, odd], .. } = &mut workspace;
    let mut bits: [Kept; TILE_ROWS] = [[0; STEP / 64]; TILE_ROWS];
    list(tiles, 0, even)?;
    let mut tile = 0;
    for (out, positions) in out.chunks_mut(TILE_ROWS).zip(positions.chunks(TILE_ROWS * of_row)) {
        *sums = zero;
        for (across, columns) in columns.chunks_exact(2).enumerate() {
            let part = across % STEP_TILES;
            if part == 0 {
                let first = across * super::TILE_SPAN;
                for (bits, row) in bits.iter_mut().zip(positions.chunks_exact(of_row)) {
                    let positions = &row[first / BYTE_COLUMNS..];
                    _mm_prefetch::<_MM_HINT_T1>(positions.as_ptr().wrapping_add(TILE_ROWS * of_row).cast());
                    // SAFETY: the processor has it.
                    if !unsafe { kept(positions, cols - first, bits) } {
                        return Err(Bad::Positions);
                    }
                }
            }
            let (now, next) = if tile % 2 == 0 { (&mut *even, &mut *odd) } else { (&mut *odd, &mut *even) };
            list(tiles, tile + 1, next)?;
            let (bytes, codes) = (&tiles.sign_mantissa[tile], &tiles.codes[tile]);
            if tiles.escapes(tile).0.is_empty() {
                add::<ODD, false>(&decoder, bytes, codes, now, columns, &bits, part, sums);
            } else {
                add::<ODD, true>(&decoder, bytes, codes, now, columns, &bits, part, sums);
            }
            tile += 1;
        }
        for (out, sums) in out.iter_mut().zip(&*sums) {
            *out = fold(*sums);
        }
    }
    Ok(())
}

/// Adds a tile's products; `patches` are zero afterwards. Rows past the end are added up, too, and dropped.
#[allow(unsafe_code)]
#[allow(clippy::too_many_arguments, reason = "what a tile is made of, and what it is multiplied with")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2")]
#[inline]
fn add<const ODD: bool, const ESCAPES: bool>(
    decoder: &Decoder<ODD>,
    bytes: &[u8; TILE_WEIGHTS],
    codes: &[u8; TILE_CODE_BYTES],
    patches: &mut Patches,
    columns: &[Columns],
    kept: &[Kept; TILE_ROWS],
    part: usize,
    sums: &mut Sums,
) {
    let (patches, _) = patches.as_chunks_mut::<32>();
    let (halves, _) = bytes.as_chunks::<{ TILE_WEIGHTS / 2 }>();
    for g in 0..8 {
        for half in halves {
            let ahead = half.as_ptr().wrapping_add(AHEAD * TILE_WEIGHTS + 64 * g);
            _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
        }
        let ahead = codes.as_ptr().wrapping_add(AHEAD * TILE_CODE_BYTES + 64 * g);
        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
        // SAFETY: 64 bytes, g < 8.
        let codes = unsafe { _mm512_loadu_si512(codes[64 * g..][..64].as_ptr().cast()) };
        for (half, (bytes, (x, masks))) in halves.iter().zip(columns).enumerate() {
            // SAFETY: as above.
            let bytes = unsafe { _mm512_loadu_si512(bytes[64 * g..][..64].as_ptr().cast()) };
            let codes = match half {
                0 => _mm512_unpacklo_epi64(codes, codes),
                _ => _mm512_unpackhi_epi64(codes, codes),
            };
            for (row, mut words) in [g, g + 8].into_iter().zip(decoder.words(bytes, codes)) {
                if ESCAPES {
                    let patches = patches[2 * row + half].as_mut_ptr().cast();
                    // SAFETY: 32 words.
                    unsafe {
                        words = _mm512_add_epi16(words, _mm512_loadu_si512(patches));
                        _mm512_storeu_si512(patches, _mm512_setzero_si512());
                    }
                }
                // Sixteen values are kept of 32 columns.
                let bits = kept[row][2 * part + half];
                let upper = _mm512_castsi256_si512(_mm512_extracti64x4_epi64::<1>(words));
                let spread = [
                    _mm512_maskz_expand_epi16(bits as u32, words),
                    _mm512_maskz_expand_epi16((bits >> 32) as u32, upper),
                ];
                for (i, words) in spread.into_iter().enumerate() {
                    let even = _mm512_slli_epi32::<16>(words);
                    let odd = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                    for (weights, v) in [(even, 2 * i), (odd, 2 * i + 1)] {
                        let weights = _mm512_castsi512_ps(weights);
                        // Sums past the end stay as they are, the sign of a zero too.
                        sums[row][v] = _mm512_mask3_fmadd_ps(weights, x[v], sums[row][v], masks[v]);
                    }
                }
            }
        }
    }
}
