//! AVX-512: the codes of 64 columns as bytes, then as weights from a table of 16 or by arithmetic.
//!
//! ```text
//! fields --shift, mask--> 32 bytes --spread by the bits of kept columns--> 64 bytes, a quad a lane of 32 bits
//! up to 4 bits:  a lane shifted by 8 j chooses from the 16 weights of its group, or zero
//! more:          a byte of each lane becomes a float, is moved and scaled as the encoding says
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use super::{BLOCK_COLS, Grids, KEPT_WORDS, SparseCodes};
use crate::cpu::abq::fields;

/// The index of a weight that is not kept, past those of the codes.
const NOT_KEPT: i8 = 16;

/// What makes weights of the codes of a group.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Grid {
    /// Of up to 4 bits: the weights of all codes.
    table: __m512,
    scale: __m512,
    zero: __m512,
}

impl Grid {
    /// # Safety
    /// The processor has AVX-512 F.
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(in crate::cpu) unsafe fn new<const P: usize, const REAL: bool>(scale: f32, zero: f32) -> Self {
        let (scale, zero) = (_mm512_set1_ps(scale), _mm512_set1_ps(zero));
        let codes = _mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        );
        let mut grid = Self { table: codes, scale, zero };
        if P <= 4 {
            grid.table = grid.of::<REAL>(codes);
        }
        grid
    }

    /// Weights of codes in single precision.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn of<const REAL: bool>(&self, codes: __m512) -> __m512 {
        if REAL {
            // The product is rounded before the sum.
            _mm512_add_ps(_mm512_mul_ps(self.scale, codes), self.zero)
        } else {
            _mm512_mul_ps(self.scale, _mm512_sub_ps(codes, self.zero))
        }
    }

    /// Weights of the indices in the low bits of each lane.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn choose(&self, indices: __m512i) -> __m512 {
        _mm512_permutex2var_ps(self.table, indices, _mm512_setzero_ps())
    }
}

/// The codes of a block, a byte a column: those of columns that are not kept are past all codes where there are up to 4
/// bits, else of no meaning.
///
/// # Safety
/// `words` are those of a block of `P` planes.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
#[inline]
unsafe fn spread<const P: usize>(words: *const u32) -> (__m512i, __mmask64) {
    // SAFETY: the caller's promise.
    unsafe {
        let kept: u64 = words.cast::<u64>().read_unaligned();
        let mut codes = _mm256_setzero_si256();
        let (fields, count) = const { fields(P, false) };
        let mut i = 0;
        while i < count {
            let from = words.add(KEPT_WORDS + fields[i].offset);
            let bits = match fields[i].bits {
                4 => {
                    let twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(from.cast()));
                    let down = _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4));
                    _mm256_and_si256(down, _mm256_set1_epi8(15))
                }
                2 => {
                    let all = _mm256_set1_epi64x(from.cast::<i64>().read_unaligned());
                    let down = _mm256_srlv_epi64(all, _mm256_setr_epi64x(0, 2, 4, 6));
                    _mm256_and_si256(down, _mm256_set1_epi8(3))
                }
                _ => _mm256_maskz_mov_epi8(from.read(), _mm256_set1_epi8(1)),
            };
            // Bits stay within their byte.
            let moved = match fields[i].offset {
                0 => bits,
                2 => _mm256_slli_epi16::<2>(bits),
                4 => _mm256_slli_epi16::<4>(bits),
                _ => _mm256_slli_epi16::<6>(bits),
            };
            codes = if i == 0 { moved } else { _mm256_or_si256(codes, moved) };
            i += 1;
        }
        let codes = _mm512_castsi256_si512(codes);
        let spread = _mm512_mask_expand_epi8(_mm512_set1_epi8(NOT_KEPT), kept, codes);
        (spread, kept)
    }
}

/// The weights of a block: lane i of vector j is column 4 i + j.
///
/// # Safety
/// The processor has the features; `words` are those of a block of `P` planes.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
#[inline]
pub(in crate::cpu) unsafe fn by_quads<const P: usize, const REAL: bool>(
    words: *const u32,
    grid: &Grid,
) -> [__m512; 4] {
    // SAFETY: the caller's promise.
    let (codes, kept) = unsafe { spread::<P>(words) };
    let lanes = [
        codes,
        _mm512_srli_epi32::<8>(codes),
        _mm512_srli_epi32::<16>(codes),
        _mm512_srli_epi32::<24>(codes),
    ];
    if P <= 4 {
        return lanes.map(|lanes| grid.choose(lanes));
    }
    let kept = _mm512_movm_epi8(kept);
    let mut weights = lanes;
    for (j, weights) in weights.iter_mut().enumerate() {
        let codes = _mm512_and_si512(lanes[j], _mm512_set1_epi32(0xff));
        let all = grid.of::<REAL>(_mm512_cvtepi32_ps(codes));
        let kept = _mm512_test_epi32_mask(kept, _mm512_set1_epi32((0xff_u32 << (8 * j)) as i32));
        *weights = _mm512_castps_si512(_mm512_maskz_mov_ps(kept, all));
    }
    weights.map(|weights| _mm512_castsi512_ps(weights))
}

/// As [`SparseCodes::widen`].
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VBMI2; the rows exist, and `out` has room for them.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
pub(super) unsafe fn widen(codes: &SparseCodes, rows: Range<usize>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        macro_rules! planes {
            ($($planes:literal)*) => {
                match (codes.planes(), codes.has_offsets()) {
                    $(($planes, false) => all::<$planes, false>(codes, rows, out),
                    ($planes, true) => all::<$planes, true>(codes, rows, out),)*
                    _ => {}
                }
            };
        }
        planes!(1 2 3 4 5 6 7 8);
    }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
unsafe fn all<const P: usize, const REAL: bool>(codes: &SparseCodes, rows: Range<usize>, out: &mut [f32]) {
    let (cols, mut grids) = (codes.cols(), Grids::default());
    for (row, out) in rows.zip(out.chunks_exact_mut(cols.max(1))) {
        codes.grids(row..row + 1, &mut grids);
        let words = codes.row(row).as_ptr();
        for group in 0..codes.groups() {
            // SAFETY: blocks of this row; the masks leave out what is past its end.
            unsafe {
                let grid = Grid::new::<P, REAL>(grids.scale[group], grids.zero[group]);
                for block in codes.group(group) {
                    let (bytes, kept) = spread::<P>(words.add(block * codes.block_words()));
                    let quarters = [
                        _mm512_extracti32x4_epi32::<0>(bytes),
                        _mm512_extracti32x4_epi32::<1>(bytes),
                        _mm512_extracti32x4_epi32::<2>(bytes),
                        _mm512_extracti32x4_epi32::<3>(bytes),
                    ];
                    for (v, quarter) in quarters.into_iter().enumerate() {
                        let at = block * BLOCK_COLS + 16 * v;
                        let lanes = _mm512_cvtepu8_epi32(quarter);
                        let weights = if P <= 4 {
                            grid.choose(lanes)
                        } else {
                            let all = grid.of::<REAL>(_mm512_cvtepi32_ps(lanes));
                            _mm512_maskz_mov_ps((kept >> (16 * v)) as u16, all)
                        };
                        let count = cols.saturating_sub(at).min(16);
                        let mask = ((1u32 << count) - 1) as u16;
                        _mm512_mask_storeu_ps(out.as_mut_ptr().wrapping_add(at), mask, weights);
                    }
                }
            }
        }
    }
}
