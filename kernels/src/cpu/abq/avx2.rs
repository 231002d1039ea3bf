//! AVX2: half a line a vector, 8 rows at once.
//!
//! Each field is multiplied by itself: with at most 4 bits, eight pairs of products fit 16 bits.

use std::arch::x86_64::*;
use std::ops::Range;

use super::inputs::{Chunk, Floats, Form, Integers};
use super::layout::{Field, Lanes, Line, Sums, Zeros, fields};
use super::{BLOCK_COLS, Matrix, TILE_ROWS};

/// Rows of half a tile.
const ROWS: usize = TILE_ROWS / 2;

/// As [`super::plain::multiply`]; only where AVX2, FMA and F16C were detected.
pub(super) fn multiply(
    matrix: &Matrix,
    tiles: Range<usize>,
    chunk: &Chunk<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    assert!(tiles.end * TILE_ROWS < matrix.rows + TILE_ROWS && totals.len() == tiles.len() * chunk.padded);
    macro_rules! planes {
        ($planes:literal, $apart:literal) => {
            // SAFETY: the features were detected, and the tiles exist.
            unsafe { run::<$planes, $apart>(matrix, tiles, chunk, totals) }
        };
    }
    #[allow(unsafe_code)]
    match (matrix.planes, matrix.apart) {
        (1, _) => planes!(1, false),
        (2, false) => planes!(2, false),
        (2, true) => planes!(2, true),
        (3, false) => planes!(3, false),
        (3, true) => planes!(3, true),
        (4, false) => planes!(4, false),
        (4, true) => planes!(4, true),
        (5, _) => planes!(5, false),
        (6, _) => planes!(6, false),
        (7, _) => planes!(7, false),
        _ => planes!(8, false),
    }
}

/// Which halves of tiles, the first one counted from the first tile, and which of the chunk's tokens.
#[derive(Clone, Copy)]
struct Part {
    tile: usize,
    half: usize,
    token: usize,
    padded: usize,
}

impl Part {
    /// Tile and half, the `h`th.
    fn of(self, h: usize) -> (usize, usize) {
        (self.tile + (self.half + h) / 2, (self.half + h) % 2)
    }
}

/// As many halves at once as hide how long a sum takes, and as the registers hold.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run<const P: usize, const APART: bool>(
    matrix: &Matrix,
    tiles: Range<usize>,
    chunk: &Chunk<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    let padded = chunk.padded;
    for token in (0..padded).step_by(4) {
        let mut half = 0;
        while half < 2 * tiles.len() {
            let part = Part { tile: tiles.start, half, token, padded };
            let four = 2 * tiles.len() - half >= 4;
            // SAFETY: the tiles and the tokens exist; there is an even number of halves.
            half += unsafe {
                match (chunk.form, padded) {
                    (Form::Floats(x), 1) if four => floats::<P, 1, 4>(matrix, part, &x, totals),
                    (Form::Floats(x), 1) => floats::<P, 1, 2>(matrix, part, &x, totals),
                    (Form::Floats(x), 2) if four => floats::<P, 2, 4>(matrix, part, &x, totals),
                    (Form::Floats(x), 2) => floats::<P, 2, 2>(matrix, part, &x, totals),
                    (Form::Floats(x), _) => floats::<P, 4, 2>(matrix, part, &x, totals),
                    (Form::Integers(x), 1) if four => integers::<P, APART, 1, 4>(matrix, part, &x, totals),
                    (Form::Integers(x), 1) => integers::<P, APART, 1, 2>(matrix, part, &x, totals),
                    (Form::Integers(x), 2) => integers::<P, APART, 2, 2>(matrix, part, &x, totals),
                    (Form::Integers(x), _) => integers::<P, APART, 4, 1>(matrix, part, &x, totals),
                }
            };
        }
    }
}

/// Half of a line.
///
/// # Safety
/// The line exists, and `half` is 0 or 1.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load(line: *const Line, half: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_load_si256(line.cast::<__m256i>().add(half)) }
}

/// `T` tokens by `H` halves; returns `H`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn integers<const P: usize, const APART: bool, const T: usize, const H: usize>(
    matrix: &Matrix,
    part: Part,
    x: &Integers<'_>,
    out: &mut [[f32; TILE_ROWS]],
) -> usize {
    let (fields, count): ([Field; 8], usize) = const { fields(P, APART) };
    let Part { token, padded, .. } = part;
    let mut totals = [[_mm256_setzero_ps(); T]; H];
    for group in 0..matrix.groups {
        let mut sums = [[_mm256_setzero_si256(); T]; H];
        for (h, sums) in sums.iter_mut().enumerate() {
            let (tile, half) = part.of(h);
            // SAFETY: the sums of this tile and group.
            let of_codes = unsafe { code_sums(&matrix.sums, matrix.lanes(tile, group) + half * ROWS) };
            for (t, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_mullo_epi32(of_codes, _mm256_set1_epi32(x.corrections[token + t]));
            }
        }
        for block in matrix.group_blocks(group) {
            // SAFETY: the inputs have a block of each token for it.
            let x = unsafe { x.codes.as_ptr().add((block * padded + token) * BLOCK_COLS).cast::<i32>() };
            for (h, sums) in sums.iter_mut().enumerate() {
                let (tile, half) = part.of(h);
                let lines = matrix.lines[matrix.block(tile, block)..][..P].as_ptr();
                let mut i = 0;
                while i < count {
                    let Field { bits, offset } = fields[i];
                    let mask = _mm256_set1_epi8((u8::MAX >> (8 - bits)) as i8);
                    let mut narrow = [_mm256_setzero_si256(); T];
                    for quad in 0..8 {
                        let at = quad * bits;
                        // SAFETY: a field has as many lines as bits; four columns of every token.
                        unsafe {
                            let line = load(lines.add(offset + at / 8), half);
                            let moved = _mm256_srl_epi16(line, _mm_cvtsi32_si128((at % 8) as i32));
                            let codes = _mm256_and_si256(moved, mask);
                            for (t, narrow) in narrow.iter_mut().enumerate() {
                                let x = _mm256_set1_epi32(x.add(t * 8 + quad).read_unaligned());
                                *narrow = _mm256_add_epi16(*narrow, _mm256_maddubs_epi16(codes, x));
                            }
                        }
                    }
                    let up = _mm_cvtsi32_si128(offset as i32);
                    for (sum, narrow) in sums.iter_mut().zip(narrow) {
                        let wide = _mm256_madd_epi16(narrow, _mm256_set1_epi16(1));
                        *sum = _mm256_add_epi32(*sum, _mm256_sll_epi32(wide, up));
                    }
                    i += 1;
                }
            }
        }
        for (h, (sums, totals)) in sums.into_iter().zip(&mut totals).enumerate() {
            let (tile, half) = part.of(h);
            let at = matrix.lanes(tile, group) + half * ROWS;
            // SAFETY: the lanes of this tile and group.
            let scale = unsafe { lanes(&matrix.scale, at) };
            for (t, (sum, total)) in sums.into_iter().zip(totals).enumerate() {
                let of_inputs = x.sums[(token + t) * matrix.groups + group];
                // SAFETY: as above.
                unsafe {
                    if let Zeros::Real(offset) = &matrix.zero {
                        *total = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum), *total);
                        let of_inputs = _mm256_set1_ps(of_inputs as f32);
                        *total = _mm256_fmadd_ps(lanes(offset, at), of_inputs, *total);
                    } else {
                        let zero = match &matrix.zero {
                            Zeros::Integer(values) => zeros(values, at),
                            _ => _mm256_set1_epi32(1 << (matrix.bits - 1)),
                        };
                        let less = _mm256_mullo_epi32(zero, _mm256_set1_epi32(of_inputs));
                        let sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, less));
                        *total = _mm256_fmadd_ps(scale, sum, *total);
                    }
                }
            }
        }
    }
    for (h, totals) in totals.into_iter().enumerate() {
        for (t, total) in totals.into_iter().enumerate() {
            let total = _mm256_mul_ps(total, _mm256_set1_ps(x.steps[token + t]));
            store(out, part, h, t, total);
        }
    }
    H
}

/// `T` tokens by `H` halves; returns `H`.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn floats<const P: usize, const T: usize, const H: usize>(
    matrix: &Matrix,
    part: Part,
    x: &Floats<'_>,
    out: &mut [[f32; TILE_ROWS]],
) -> usize {
    const INTEGER: i32 = 0x4b00_0000;
    let (fields, count): ([Field; 8], usize) = const { fields(P, false) };
    let Part { token, padded, .. } = part;
    let centre = matrix.centre();
    let mut table = [0.0f32; 8];
    for (i, value) in table.iter_mut().enumerate() {
        *value = (i % (1 << P.min(3))) as f32 - centre;
    }
    // SAFETY: 8 values.
    let table = unsafe { _mm256_loadu_ps(table.as_ptr()) };
    let less = _mm256_set1_ps(f32::from_bits(INTEGER as u32) + centre);
    let mut totals = [[_mm256_setzero_ps(); T]; H];
    for group in 0..matrix.groups {
        let mut sums = [[_mm256_setzero_ps(); T]; H];
        for block in matrix.group_blocks(group) {
            // SAFETY: the inputs have `padded` tokens for each of its columns.
            let x = unsafe { x.x.as_ptr().add(block * BLOCK_COLS * padded + token) };
            for column in 0..BLOCK_COLS {
                for (h, sums) in sums.iter_mut().enumerate() {
                    let (tile, half) = part.of(h);
                    let lines = matrix.lines.as_ptr().wrapping_add(matrix.block(tile, block));
                    let mut codes = _mm256_setzero_si256();
                    let mut i = 0;
                    while i < count {
                        let Field { bits, offset } = fields[i];
                        let at = column / 4 * bits;
                        let shift = column % 4 * 8 + at % 8;
                        // SAFETY: a field has as many lines as bits.
                        let line = unsafe { load(lines.wrapping_add(offset + at / 8), half) };
                        let moved = _mm256_srl_epi32(line, _mm_cvtsi32_si128(shift as i32));
                        // A table of eight looks at three bits only.
                        let field = if P <= 3 && count == 1 {
                            moved
                        } else {
                            _mm256_and_si256(moved, _mm256_set1_epi32((1 << bits) - 1))
                        };
                        let field = _mm256_sll_epi32(field, _mm_cvtsi32_si128(offset as i32));
                        codes = _mm256_or_si256(codes, field);
                        i += 1;
                    }
                    let weights = if P <= 3 {
                        _mm256_permutevar8x32_ps(table, codes)
                    } else {
                        let float = _mm256_or_si256(codes, _mm256_set1_epi32(INTEGER));
                        _mm256_sub_ps(_mm256_castsi256_ps(float), less)
                    };
                    for (t, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: as above.
                        let x = unsafe { _mm256_set1_ps(*x.add(column * padded + t)) };
                        *sum = _mm256_fmadd_ps(weights, x, *sum);
                    }
                }
            }
        }
        for (h, (sums, totals)) in sums.into_iter().zip(&mut totals).enumerate() {
            let (tile, half) = part.of(h);
            let at = matrix.lanes(tile, group) + half * ROWS;
            // SAFETY: the lanes of this tile and group.
            let scale = unsafe { lanes(&matrix.scale, at) };
            for (t, (sum, total)) in sums.into_iter().zip(totals).enumerate() {
                let of_inputs = _mm256_set1_ps(x.sums[(token + t) * matrix.groups + group]);
                // SAFETY: as above.
                unsafe {
                    match &matrix.zero {
                        Zeros::Symmetric => *total = _mm256_fmadd_ps(scale, sum, *total),
                        Zeros::Integer(values) => {
                            let zero = _mm256_cvtepi32_ps(zeros(values, at));
                            let from = _mm256_sub_ps(_mm256_set1_ps(centre), zero);
                            *total = _mm256_fmadd_ps(scale, _mm256_fmadd_ps(from, of_inputs, sum), *total);
                        }
                        Zeros::Real(offset) => {
                            let offset = _mm256_fmadd_ps(scale, _mm256_set1_ps(centre), lanes(offset, at));
                            *total = _mm256_fmadd_ps(scale, sum, *total);
                            *total = _mm256_fmadd_ps(offset, of_inputs, *total);
                        }
                    }
                }
            }
        }
    }
    for (h, totals) in totals.into_iter().enumerate() {
        for (t, total) in totals.into_iter().enumerate() {
            store(out, part, h, t, total);
        }
    }
    H
}

/// Writes the totals of a half and a token.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
#[inline]
fn store(out: &mut [[f32; TILE_ROWS]], part: Part, h: usize, t: usize, total: __m256) {
    let (tile, half) = part.of(h);
    let out = &mut out[(tile - part.tile) * part.padded + part.token + t][half * ROWS..][..ROWS];
    // SAFETY: 8 rows.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), total) };
}

/// Values of 8 rows.
///
/// # Safety
/// There are 8 from `at` on.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn lanes(lanes: &Lanes, at: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        match lanes {
            Lanes::F16(x) => _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(at).cast())),
            Lanes::Bf16(x) => {
                let words = _mm_loadu_si128(x.as_ptr().add(at).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
            }
            Lanes::F32(x) => _mm256_loadu_ps(x.as_ptr().add(at)),
        }
    }
}

/// Sums of codes of 8 rows.
///
/// # Safety
/// There are 8 from `at` on, if there are any.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn code_sums(sums: &Sums, at: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        match sums {
            Sums::None => _mm256_setzero_si256(),
            Sums::Narrow(x) => _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(at).cast())),
            Sums::Wide(x) => _mm256_loadu_si256(x.as_ptr().add(at).cast()),
        }
    }
}

/// Integer zeros of 8 rows.
///
/// # Safety
/// There are 8 from `at` on.
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn zeros(zeros: &[u8], at: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(zeros.as_ptr().add(at).cast())) }
}
