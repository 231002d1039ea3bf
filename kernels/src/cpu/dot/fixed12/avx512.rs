//! AVX-512 with VBMI: half a row of a tile at a time, as 32 words of bfloat16.
//!
//! ```text
//! sign_mantissa byte b --unpack-->  s K/2 b     sign, a constant that holds the base, sign again and mantissa
//! codes  --shift each byte, mask-->   code << 7
//! sum, s K+s+code m = a word of bfloat16; even columns are one vector of single precision, odd ones another
//! ```
//!
//! An escape is a weight of code 0 to which the difference of its exponent is added, from a tile's worth of
//! words that are else zero.

use std::arch::x86_64::*;

use llmpress_entropy::fixed12::{TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS};

use super::super::by_parity::{by_parity, first_lanes, fold};
use super::{BadEscapes, Tiles};

/// Tiles from the one that is multiplied to those asked of memory.
pub(in crate::cpu::dot) const AHEAD: usize = 8;

/// The sums of a strip's rows: even and odd columns of the left half, then of the right.
pub(in crate::cpu::dot) type Sums = [[__m512; 4]; TILE_ROWS];
/// What is added to each word of a tile.
pub(in crate::cpu::dot) type Patches = [u16; TILE_WEIGHTS];

/// What is written and read again. Loads wait for younger stores at the same distance from a page's start as if
/// they were to the same place, so the parts lie where those are long done.
#[repr(C, align(4096))]
pub(in crate::cpu::dot) struct Workspace {
    pub(in crate::cpu::dot) sums: Sums,
    gap: [u8; 256],
    /// Two, so that a tile's patches are written long before they are read.
    pub(in crate::cpu::dot) patches: [Patches; 2],
}

impl Workspace {
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(in crate::cpu::dot) fn new() -> Self {
        Self { sums: [[_mm512_setzero_ps(); 4]; TILE_ROWS], gap: [0; 256], patches: [[0; TILE_WEIGHTS]; 2] }
    }
}

/// The product over all strips.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VBMI.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,f16c")]
pub(super) unsafe fn dot(tiles: &Tiles<'_>, x: &[f32], out: &mut [f32]) -> Result<(), BadEscapes> {
    if tiles.base.is_multiple_of(2) { strips::<false>(tiles, x, out) } else { strips::<true>(tiles, x, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,f16c")]
fn strips<const ODD: bool>(tiles: &Tiles<'_>, x: &[f32], out: &mut [f32]) -> Result<(), BadEscapes> {
    let decoder = Decoder::<ODD>::new(tiles.base);
    let zero = [[_mm512_setzero_ps(); 4]; TILE_ROWS];
    let mut workspace = Workspace::new();
    let Workspace { sums, patches: [even, odd], .. } = &mut workspace;
    list(tiles, 0, even)?;
    let mut tile = 0;
    for out in out.chunks_mut(TILE_ROWS) {
        *sums = zero;
        for x in x.chunks(TILE_COLS) {
            let (now, next) = if tile % 2 == 0 { (&mut *even, &mut *odd) } else { (&mut *odd, &mut *even) };
            list(tiles, tile + 1, next)?;
            let (bytes, codes) = (&tiles.sign_mantissa[tile], &tiles.codes[tile]);
            if tiles.escapes(tile).0.is_empty() {
                add::<ODD, false>(&decoder, bytes, codes, now, x, sums);
            } else {
                add::<ODD, true>(&decoder, bytes, codes, now, x, sums);
            }
            tile += 1;
        }
        for (out, sums) in out.iter_mut().zip(&*sums) {
            *out = fold(*sums);
        }
    }
    Ok(())
}

/// Adds a tile's products. Its columns past `x` are padding; `patches` are zero afterwards.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
#[inline]
fn add<const ODD: bool, const ESCAPES: bool>(
    decoder: &Decoder<ODD>,
    bytes: &[u8; TILE_WEIGHTS],
    codes: &[u8; TILE_CODE_BYTES],
    patches: &mut Patches,
    x: &[f32],
    sums: &mut Sums,
) {
    let (x, masks) = by_parity(x);
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
        for (half, bytes) in halves.iter().enumerate() {
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
                let even = _mm512_slli_epi32::<16>(words);
                let odd = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                for (weights, v) in [(even, 2 * half), (odd, 2 * half + 1)] {
                    let weights = _mm512_castsi512_ps(weights);
                    // Sums past the end stay as they are, the sign of a zero too.
                    sums[row][v] = _mm512_mask3_fmadd_ps(weights, x[v], sums[row][v], masks[v]);
                }
            }
        }
    }
}

/// Writes the escapes of `tile`, if there is such a tile, into `patches`, which are zero before.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
pub(in crate::cpu::dot) fn list(
    tiles: &Tiles<'_>,
    tile: usize,
    patches: &mut Patches,
) -> Result<(), BadEscapes> {
    let (all_positions, all_exponents) = tiles.escapes(tile);
    if all_positions.is_empty() {
        return Ok(());
    }
    let bytes = &tiles.sign_mantissa[tile];
    let (rows, cols) = tiles.extent(tile);
    let (rows, cols) = (_mm512_set1_epi32(rows as i32), _mm512_set1_epi32(cols as i32));
    let bits = |x, mask| _mm512_and_si512(x, _mm512_set1_epi32(mask));
    let mut last = _mm512_set1_epi32(-1);
    for (positions16, exponents8) in all_positions.chunks(16).zip(all_exponents.chunks(16)) {
        let mask = first_lanes(positions16.len());
        // SAFETY: the mask leaves out what is past the ends, which are the same.
        let (positions, exponents) = unsafe {
            (
                _mm256_maskz_loadu_epi16(mask, positions16.as_ptr().cast()),
                _mm_maskz_loadu_epi8(mask, exponents8.as_ptr().cast()),
            )
        };
        let (positions, exponents) = (_mm512_cvtepu16_epi32(positions), _mm512_cvtepu8_epi32(exponents));
        // Each position beside the one before it.
        let before = _mm512_alignr_epi32::<15>(positions, last);
        last = positions;
        let good = _mm512_mask_cmplt_epi32_mask(mask, before, positions);
        let good = _mm512_mask_cmplt_epi32_mask(good, _mm512_srli_epi32::<6>(positions), rows);
        if _mm512_mask_cmplt_epi32_mask(good, bits(positions, TILE_COLS as i32 - 1), cols) != mask {
            return Err(BadEscapes { tile });
        }
        // Lanes past the end do as the first: a loop of any other length would be mispredicted.
        let (positions, exponents) = (first_fills(mask, positions), first_fills(mask, exponents));
        // `byte_index` of row (1 + 3 bits) and column (1 + 2 + 3 bits), as the word that holds it and a shift.
        let row_half = _mm512_srli_epi32::<6>(bits(positions, 0x200));
        let col_half = _mm512_slli_epi32::<4>(bits(positions, 0x20));
        let lane = _mm512_slli_epi32::<1>(bits(positions, 0x18));
        let word = _mm512_or_si512(
            _mm512_or_si512(row_half, col_half),
            _mm512_or_si512(lane, bits(positions, 0x1c4)),
        );
        let shift = _mm512_slli_epi32::<3>(bits(positions, 3));
        // SAFETY: positions are less than 1024, so words end within the tile's 1024 bytes.
        let words = unsafe { _mm512_i32gather_epi32::<1>(word, bytes.as_ptr().cast()) };
        let sign = bits(_mm512_srlv_epi32(words, shift), 0x80);
        let base = _mm512_set1_epi32(tiles.base.cast_signed());
        let patch = _mm512_sub_epi32(_mm512_slli_epi32::<7>(_mm512_sub_epi32(exponents, base)), sign);
        for (at, patch) in to_array(positions).into_iter().zip(to_array(patch)) {
            // SAFETY: positions are less than 1024.
            unsafe { *patches.get_unchecked_mut(at as usize) = patch as u16 };
        }
    }
    Ok(())
}

/// The first lane in place of those that `mask` leaves out.
#[target_feature(enable = "avx512f")]
#[inline]
fn first_fills(mask: __mmask16, x: __m512i) -> __m512i {
    _mm512_mask_mov_epi32(_mm512_broadcastd_epi32(_mm512_castsi512_si128(x)), mask, x)
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
#[inline]
fn to_array(x: __m512i) -> [u32; 16] {
    let mut array = [0; 16];
    // SAFETY: sixteen words.
    unsafe { _mm512_storeu_si512(array.as_mut_ptr().cast(), x) };
    array
}

/// Operands of decoding. A base that is `ODD` is made even by the distance of codes from 15.
pub(in crate::cpu::dot) struct Decoder<const ODD: bool> {
    /// Half of the base, or of the base and 15, in every byte.
    half_base: __m512i,
    /// For rows g and g + 8: where in its 64 bits a byte of `code << 7` begins.
    shifts: [__m512i; 2],
}

impl<const ODD: bool> Decoder<ODD> {
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(in crate::cpu::dot) fn new(base: u32) -> Self {
        let even_base = if ODD { base + 15 } else { base };
        let shifts = [0, 1].map(|row: u8| {
            let starts = std::array::from_fn::<u8, 64, _>(|i| {
                // Words of eight columns; columns 2 j and 2 j + 1 lie at bits 4 j and 16 + 4 j.
                let col = (i / 2 % 8) as u8;
                let code = 32 * row + 4 * (col / 2) + 16 * (col % 2);
                (if i % 2 == 0 { code.wrapping_sub(7) } else { code + 1 }) % 64
            });
            // SAFETY: 64 bytes.
            unsafe { _mm512_loadu_si512(starts.as_ptr().cast()) }
        });
        Self { half_base: _mm512_set1_epi8((even_base / 2) as i8), shifts }
    }

    /// Words of rows g and g + 8 in a half of a tile, as if nothing were an escape. `codes` has those of the half
    /// twice.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    pub(in crate::cpu::dot) fn words(&self, bytes: __m512i, codes: __m512i) -> [__m512i; 2] {
        // Of each byte the sign, with the base below it.
        const AND_OR: i32 = 0b1110_1010;
        let upper = _mm512_ternarylogic_epi32::<{ AND_OR }>(bytes, _mm512_set1_epi8(i8::MIN), self.half_base);
        let words = [_mm512_unpacklo_epi8(bytes, upper), _mm512_unpackhi_epi8(bytes, upper)];
        let field = _mm512_set1_epi16(0x0780);
        [0, 1].map(|row| {
            let codes = _mm512_multishift_epi64_epi8(self.shifts[row], codes);
            if ODD {
                _mm512_sub_epi16(words[row], _mm512_andnot_si512(codes, field))
            } else {
                _mm512_add_epi16(words[row], _mm512_and_si512(codes, field))
            }
        })
    }
}
