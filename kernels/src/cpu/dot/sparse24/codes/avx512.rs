//! AVX-512: four rows at a time, 64 columns each: the quads of a block are lanes, their places vectors.

use std::arch::x86_64::*;

use crate::cpu::dot::ahead;
use crate::cpu::sparse24::codes::avx512::{Grid, by_quads};
use crate::cpu::sparse24::codes::{BLOCK_COLS, Grids, SparseCodes};

/// Rows that are multiplied together.
const ROWS: usize = 4;

/// Columns of a block, lane i of vector j being column 4 i + j, and which of them exist.
type Columns = ([__m512; 4], [__mmask16; 4]);

/// The product of rows from the first on.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VBMI2; the rows exist, and `x` has a value for each column.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
pub(super) unsafe fn dot(codes: &SparseCodes, first: usize, x: &[f32], out: &mut [f32]) {
    let x: Vec<Columns> = x.chunks(BLOCK_COLS).map(|x| columns(x)).collect();
    // SAFETY: the caller's promise.
    unsafe {
        macro_rules! planes {
            ($($planes:literal)*) => {
                match (codes.planes(), codes.has_offsets()) {
                    $(($planes, false) => all::<$planes, false>(codes, first, &x, out),
                    ($planes, true) => all::<$planes, true>(codes, first, &x, out),)*
                    _ => {}
                }
            };
        }
        planes!(1 2 3 4 5 6 7 8);
    }
}

/// Up to 64 values.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn columns(x: &[f32]) -> Columns {
    let (mut lanes, mut masks) = ([[0.0f32; 16]; 4], [0; 4]);
    for (k, x) in x.iter().enumerate() {
        lanes[k % 4][k / 4] = *x;
        masks[k % 4] |= 1 << (k / 4);
    }
    // SAFETY: sixteen lanes.
    (lanes.map(|lanes| unsafe { _mm512_loadu_ps(lanes.as_ptr()) }), masks)
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
unsafe fn all<const P: usize, const REAL: bool>(
    codes: &SparseCodes,
    first: usize,
    x: &[Columns],
    out: &mut [f32],
) {
    let mut grids = Grids::default();
    let mut done = 0;
    while done < out.len() {
        let row = first + done;
        // SAFETY: rows row .. row + R exist.
        unsafe {
            if out.len() - done >= ROWS {
                codes.grids(row..row + ROWS, &mut grids);
                out[done..done + ROWS].copy_from_slice(&rows::<P, REAL, ROWS>(codes, row, x, &grids));
                done += ROWS;
            } else {
                codes.grids(row..row + 1, &mut grids);
                out[done] = rows::<P, REAL, 1>(codes, row, x, &grids)[0];
                done += 1;
            }
        }
    }
}

/// `R` rows. What lies `R` rows on, or a multiple of that, is brought into the second cache.
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
#[inline]
unsafe fn rows<const P: usize, const REAL: bool, const R: usize>(
    codes: &SparseCodes,
    row: usize,
    x: &[Columns],
    grids: &Grids,
) -> [f32; R] {
    let mut sums = [[_mm512_setzero_ps(); 4]; R];
    let of_row = codes.row(row).len();
    let words: [*const u32; R] = std::array::from_fn(|r| codes.row(row + r).as_ptr());
    let ahead = ahead(R.saturating_mul(of_row), 4);
    for group in 0..codes.groups() {
        // SAFETY: the processor has the features.
        let grid = |r: usize| unsafe {
            let at = r * codes.groups() + group;
            Grid::new::<P, REAL>(grids.scale[at], grids.zero[at])
        };
        let grid: [Grid; R] = std::array::from_fn(grid);
        let blocks = codes.group(group);
        for (block, (x, masks)) in blocks.clone().zip(&x[blocks]) {
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the block exists; what is asked of memory need not.
                unsafe {
                    let words = words[r].add(block * (2 + P));
                    _mm_prefetch::<_MM_HINT_T1>(words.cast::<i8>().wrapping_add(ahead));
                    let weights = by_quads::<P, REAL>(words, &grid[r]);
                    if masks[3] == __mmask16::MAX {
                        for ((sum, weights), x) in sums.iter_mut().zip(weights).zip(x) {
                            *sum = _mm512_fmadd_ps(weights, *x, *sum);
                        }
                    } else {
                        for v in 0..4 {
                            // Sums past the end stay as they are, the sign of a zero too.
                            sums[v] = _mm512_mask3_fmadd_ps(weights[v], x[v], sums[v], masks[v]);
                        }
                    }
                }
            }
        }
    }
    sums.map(|sums| fold(sums))
}

/// The tree of [`super::fold`] where columns lie apart by their place in a quad.
#[target_feature(enable = "avx512f,avx512vl")]
#[inline]
fn fold(sums: [__m512; 4]) -> f32 {
    // Columns k and k + 32 are lanes i and i + 8 of one vector; then i and i + 4.
    let eight = sums.map(|sum| {
        let upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64::<1>(_mm512_castps_si512(sum)));
        _mm256_add_ps(_mm512_castps512_ps256(sum), upper)
    });
    let four = |a: __m256, b: __m256| {
        let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
        _mm256_add_ps(low, high)
    };
    // [vector 0 | vector 1], [vector 2 | vector 3]; lanes i and i + 2, then 0 and 1.
    let (a, b) = (four(eight[0], eight[1]), four(eight[2], eight[3]));
    let low = _mm256_shuffle_ps::<0b01_00_01_00>(a, b);
    let high = _mm256_shuffle_ps::<0b11_10_11_10>(a, b);
    let two = _mm256_add_ps(low, high);
    let one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
    // Lane 0 of vectors 0 (and 1), lane 2 of 2 (and 3).
    let half = _mm256_add_ps(one, _mm256_permute_ps::<0b10_10_10_10>(one));
    _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half)))
}
