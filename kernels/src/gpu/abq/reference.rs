//! Scalar references of the kernels, in the orders of additions that their sources state.

use super::super::Result;
use super::super::product::slices;
use super::super::reference::widen;
use super::integer::piece;
use super::layout::{HALF_COLS, TILE_COLS};
use super::matrix::offset_of;
use super::stored::{Stored, Zero, check};

/// The code of a weight.
#[must_use]
pub fn code(stored: &Stored<'_>, row: usize, col: usize) -> u32 {
    let words = stored.cols.div_ceil(32);
    (0..usize::from(stored.planes)).fold(0, |code, plane| {
        let word = stored.words[(plane * stored.rows + row) * words + col / 32];
        code | (word >> (col % 32) & 1) << plane
    })
}

/// Columns k of half a tile in the order in which `mma` takes them.
fn order(half: usize) -> impl Iterator<Item = usize> {
    let pairs = [0, 1].into_iter().flat_map(|part| [0, 2].map(|pair| 4 * part + pair));
    pairs.flat_map(move |at| (0..8).map(move |i| HALF_COLS * half + 8 * (i / 2) + at + i % 2))
}

/// `y [tokens, rows] = x W^T` in the order of kernels/cuda/abq.cuh. x `BF16 [tokens, stride]`, its rows whole tiles of 64.
///
/// # Errors
/// Components that do not belong together.
pub fn product(stored: &Stored<'_>, x: &[u16], stride: usize, tokens: usize) -> Result<Vec<f32>> {
    let groups = check(stored)?;
    let Stored { rows, cols, .. } = *stored;
    let length = stored.group_size.map_or(usize::MAX, |size| size / HALF_COLS);
    let centre = f32::from(1u8 << (stored.bits - 1));
    let (tiles, count, halves) = (cols.div_ceil(TILE_COLS), slices(rows), cols.div_ceil(HALF_COLS));
    let wide: Vec<f32> = x.iter().map(|word| widen(*word)).collect();
    let has_offsets = (0..rows * groups).any(|at| offset_of(stored, at) != 0.0);
    let mut y = vec![0.0; tokens * rows];
    let mut row = vec![0.0f32; tiles * TILE_COLS];
    for n in 0..rows {
        for (k, to) in row.iter_mut().enumerate().take(cols) {
            *to = code(stored, n, k) as f32 - centre;
        }
        for token in 0..tokens {
            let x = &wide[token * stride..];
            let mut total = None;
            for slice in 0..count {
                let end = halves.min(2 * (tiles * (slice + 1) / count));
                let (mut slice_sum, mut sum, mut of_x) = (0.0f32, 0.0f32, 0.0f32);
                for half in 2 * (tiles * slice / count)..end {
                    for k in order(half) {
                        sum = row[k].mul_add(x[k], sum);
                        of_x += x[k];
                    }
                    let group = half / length;
                    if (half + 1) % length == 0 || half + 1 == end {
                        let at = n * groups + group;
                        slice_sum = stored.scale.get(at).mul_add(sum, slice_sum);
                        if has_offsets {
                            slice_sum = offset_of(stored, at).mul_add(of_x, slice_sum);
                        }
                        (sum, of_x) = (0.0, 0.0);
                    }
                }
                total = Some(total.map_or(slice_sum, |before: f32| before + slice_sum));
            }
            y[token * rows + n] = total.unwrap_or(0.0);
        }
    }
    Ok(y)
}

/// Codes of a token, their step and zero, by the definition in kernels/cuda/abq_quantise.cu; none where it is not finite.
#[must_use]
pub fn quantise(x: &[f32], bits: u32) -> Option<(Vec<u32>, f32, i32)> {
    let most = ((1u32 << bits) - 1) as f32;
    let low = x.iter().fold(0.0f32, |a, b| a.min(*b));
    let high = x.iter().fold(0.0f32, |a, b| a.max(*b));
    let step = (high - low) / most;
    let step = if step == 0.0 { 1.0 } else { step };
    if !step.is_finite() || x.iter().any(|x| !x.is_finite()) {
        return None;
    }
    let zero = (-low / step).round_ties_even().clamp(0.0, most);
    let code = |x: &f32| ((x / step).round_ties_even() + zero).clamp(0.0, most) as u32;
    Some((x.iter().map(code).collect(), step, zero as i32))
}

/// `y [tokens, rows]` from `x [tokens, cols]`, whose tokens are quantised, by the definition in kernels/cuda/abq_integer.cuh. A token that
/// is not finite gives zeros.
///
/// # Errors
/// Components that do not belong together.
pub fn integer_product(stored: &Stored<'_>, x: &[f32], bits: u32) -> Result<Vec<f32>> {
    let asked = check(stored)?;
    let Stored { rows, cols, .. } = *stored;
    let piece = piece(stored);
    let tokens: Vec<_> = x.chunks(cols).map(|token| quantise(token, bits)).collect();
    let mut y = vec![0.0; tokens.len() * rows];
    for n in 0..rows {
        let row: Vec<i32> = (0..cols).map(|k| code(stored, n, k) as i32).collect();
        for (token, quantised) in tokens.iter().enumerate() {
            let Some((codes, step, zero)) = quantised else { continue };
            let mut sum = 0.0f32;
            for (group, first) in (0..cols).step_by(piece).enumerate() {
                let at = n * asked + stored.group_size.map_or(0, |size| group * piece / size);
                let (mut j, mut d) = (0i32, 0i32);
                for k in first..(first + piece).min(cols) {
                    let less = codes[k] as i32 - zero;
                    j += row[k] * less;
                    d += less;
                }
                let scale = stored.scale.get(at);
                sum = match stored.zero {
                    Zero::Symmetric => scale.mul_add((j - (d << (stored.bits - 1))) as f32, sum),
                    Zero::Integer(zeros) => scale.mul_add((j - i32::from(zeros[at]) * d) as f32, sum),
                    Zero::Real(offset) => {
                        let sum = scale.mul_add(j as f32, sum);
                        offset.get(at).mul_add(d as f32, sum)
                    }
                };
            }
            y[token * rows + n] = step * sum;
        }
    }
    Ok(y)
}
