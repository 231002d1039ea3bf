//! Scalar references of the GPU's kernels, in the orders of additions that their sources state.
//!
//! The emulator follows them bit for bit. A GPU's tensor cores round sums in a way of their own: there products and attention
//! are near them, everything else is the same.

use half::bf16;

use super::attention::{Heads, TILE};
use super::cache_codes::Layout;
use super::product::slices;
use crate::cpu::{self, HeadCodes};

/// A BF16 word as F32.
#[must_use]
pub fn widen(word: u16) -> f32 {
    bf16::from_bits(word).to_f32()
}

/// The nearest BF16 word.
#[must_use]
pub fn round(x: f32) -> u16 {
    bf16::from_f32(x).to_bits()
}

/// `y [tokens, rows] = x W^T` in the order of kernels/cuda/product.cuh. W `BF16 [rows, cols]`; x `BF16 [tokens, stride]`, its
/// rows whole tiles of 64.
#[must_use]
pub fn product(w: &[u16], rows: usize, cols: usize, x: &[u16], stride: usize, tokens: usize) -> Vec<f32> {
    product_of_pieces(w, |word| [widen(word)], rows, cols, x, stride, tokens)
}

/// `y [tokens, rows] = x W^T` of weights of which two of four are kept, in the order of kernels/cuda/sparse24.cuh. `values`: `BF16
/// [rows, cols / 2]`; `positions`: `[rows, ceil(cols / 8)]`, a nibble a quad; x `BF16 [tokens, stride]`, its rows whole tiles of 64.
#[must_use]
pub fn sparse_product(
    values: &[u16],
    positions: &[u8],
    rows: usize,
    cols: usize,
    x: &[u16],
    stride: usize,
    tokens: usize,
) -> Vec<f32> {
    let (tiles, count) = (cols.div_ceil(128), slices(rows));
    let wide: Vec<f32> = x.iter().map(|word| widen(*word)).collect();
    let mut y = vec![0.0; tokens * rows];
    for n in 0..rows {
        let values = &values[n * (cols / 2)..][..cols / 2];
        let positions = &positions[n * cols.div_ceil(8)..][..cols.div_ceil(8)];
        for token in 0..tokens {
            let x = &wide[token * stride..];
            let mut total = None;
            for slice in 0..count {
                let mut sum = 0.0f32;
                for tile in tiles * slice / count..tiles * (slice + 1) / count {
                    for quad in 32 * tile..(cols / 4).min(32 * tile + 32) {
                        let nibble = positions[quad / 2] >> (4 * (quad % 2));
                        for (i, place) in [nibble & 3, nibble >> 2 & 3].into_iter().enumerate() {
                            let value = widen(values[2 * quad + i]);
                            sum = value.mul_add(x[4 * quad + usize::from(place)], sum);
                        }
                    }
                    // Of what is past the end: no sum stays below zero there without being a number.
                    if cols < 128 * tile + 128 {
                        sum += 0.0;
                    }
                }
                total = Some(total.map_or(sum, |before: f32| before + sum));
            }
            y[token * rows + n] = total.unwrap_or(0.0);
        }
    }
    y
}

/// Sums of `block` consecutive inputs of a token, BF16, as kernels/cuda/block_sums.cu adds them.
#[must_use]
pub fn block_sums(x: &[u16], block: usize) -> Vec<u16> {
    x.chunks(block.max(1)).map(|x| round(x.iter().fold(0.0, |sum, word| sum + widen(*word)))).collect()
}

/// The same with weights of F16 or F32, `N` pieces of each as [`pieces`] cuts them.
#[must_use]
pub fn product_of_pieces<T: Copy, const N: usize>(
    w: &[T],
    cut: impl Fn(T) -> [f32; N],
    rows: usize,
    cols: usize,
    x: &[u16],
    stride: usize,
    tokens: usize,
) -> Vec<f32> {
    let (tiles, count) = (cols.div_ceil(64), slices(rows));
    let wide: Vec<f32> = x.iter().map(|word| widen(*word)).collect();
    let mut row = vec![[0.0f32; N]; tiles * 64];
    let mut y = vec![0.0; tokens * rows];
    for n in 0..rows {
        row.iter_mut().zip(&w[n * cols..][..cols]).for_each(|(to, from)| *to = cut(*from));
        for token in 0..tokens {
            let x = &wide[token * stride..];
            let mut total = None;
            for slice in 0..count {
                let mut sum = 0.0f32;
                for tile in tiles * slice / count..tiles * (slice + 1) / count {
                    for (half, part) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        for (piece, pair) in (0..N).flat_map(|piece| [(piece, 0), (piece, 2)]) {
                            for q in 0..4 {
                                for i in 0..2 {
                                    let k = tile * 64 + 32 * half + 8 * q + 4 * part + pair + i;
                                    sum = row[k][piece].mul_add(x[k], sum);
                                }
                            }
                        }
                    }
                }
                total = Some(total.map_or(sum, |before: f32| before + sum));
            }
            y[token * rows + n] = total.unwrap_or(0.0);
        }
    }
    y
}

/// The first `N` pieces of a number, each with the next eight bits of its mantissa, as kernels/cuda/dense.cuh cuts them: all of an
/// F16 in two, all of an F32 in three but for what lies below 2^-133.
#[must_use]
pub fn pieces<const N: usize>(x: f32) -> [f32; N] {
    let mut left = x;
    std::array::from_fn(|_| {
        if !left.is_finite() {
            return std::mem::take(&mut left);
        }
        let piece = f32::from_bits(left.to_bits() & 0xffff_0000);
        left -= piece;
        piece
    })
}

/// What a token's logits make of experts, by the order of kernels/cuda/experts.cu: the chosen ones by their numbers, with their
/// weights.
#[must_use]
pub fn route(logits: &[f32], top_k: usize, normalise: bool) -> Vec<(usize, f32)> {
    let top = logits.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    let p: Vec<f32> = logits.iter().map(|l| cpu::exp(l - top)).collect();
    let scale = 1.0 / p.iter().fold(0.0, |sum, p| sum + p);
    let mut order: Vec<(usize, f32)> = p.iter().map(|p| p * scale).enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    order.truncate(top_k);
    let total = order.iter().skip(1).fold(order.first().map_or(0.0, |p| p.1), |sum, p| sum + p.1);
    order.iter_mut().for_each(|(_, p)| *p /= if normalise { total } else { 1.0 });
    order.sort_by_key(|(expert, _)| *expert);
    order
}

/// The sum over 32 lanes as kernels/cuda/warp.cuh says.
#[must_use]
pub fn warp_sum(mut lanes: [f32; 32]) -> f32 {
    for distance in [16, 8, 4, 2, 1] {
        let before = lanes;
        for (lane, x) in lanes.iter_mut().enumerate() {
            *x = before[lane] + before[lane ^ distance];
        }
    }
    lanes[0]
}

/// A sum over a block of 1,024 threads, each of which adds elements 1,024 apart: `add` of its sum and an element.
fn block_sum(x: &[f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut threads = [[0.0f32; 32]; 32];
    for (i, x) in x.iter().enumerate() {
        let sum = &mut threads[i % 1024 / 32][i % 32];
        *sum = add(*sum, *x);
    }
    warp_sum(threads.map(warp_sum))
}

/// `1 / sqrt(mean of x^2 + eps)` in the order of kernels/cuda/rms_norm.cu.
#[must_use]
pub fn inverse_root(x: &[f32], eps: f32) -> f32 {
    let sum = block_sum(x, |sum, x| x.mul_add(x, sum));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// A layer norm in the order of kernels/cuda/layer_norm.cu, before it is rounded.
#[must_use]
pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Vec<f32> {
    let mean = block_sum(x, |sum, x| sum + x) / x.len() as f32;
    let left: Vec<f32> = x.iter().map(|x| x - mean).collect();
    let scale = inverse_root(&left, eps);
    let scaled = left.iter().zip(weight).map(|(x, w)| x * scale * w);
    match bias {
        Some(bias) => scaled.zip(bias).map(|(x, b)| x + b).collect(),
        None => scaled.collect(),
    }
}

/// A norm of a head's features in the order of kernels/cuda/rope.cu.
pub fn norm_head(x: &mut [f32], weight: &[f32], eps: f32) {
    let mut lanes = [0.0f32; 32];
    for (i, x) in x.iter().enumerate() {
        lanes[i % 32] = x.mul_add(*x, lanes[i % 32]);
    }
    let scale = 1.0 / (warp_sum(lanes) / x.len() as f32 + eps).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
}

/// Turns a head's features by the angles of a position: those half the turned ones apart, or neighbours.
pub fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32], neighbours: bool) {
    let half = cos.len();
    for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
        let (first, second) = if neighbours { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (low, high) = (x[first], x[second]);
        (x[first], x[second]) = (low * cos - high * sin, high * cos + low * sin);
    }
}

/// Where the element of a head's feature at a position lies among keys (kernels/cuda/cache.cuh). Features beyond the head, up to
/// a multiple of 8, are zeros.
#[must_use]
pub fn key_place(capacity: usize, head_dim: usize, head: usize, at: usize, feature: usize) -> usize {
    (head * capacity.next_multiple_of(8) + at) * head_dim.next_multiple_of(8) + feature
}

/// The same of values.
#[must_use]
pub fn value_place(capacity: usize, head_dim: usize, head: usize, at: usize, feature: usize) -> usize {
    ((head * capacity.next_multiple_of(8) + at / 8 * 8) * head_dim.next_multiple_of(8) + 8 * feature) + at % 8
}

/// Puts a key, normed and turned, or a value (its features `x`) into a sequence's memory as codes (kernels/cuda/cache_codes.cuh), and gives
/// what they stand for; none where no code does.
#[must_use]
pub fn keep_head(
    memory: &mut [u8],
    heads: Heads,
    (capacity, bits): (usize, u8),
    is_key: bool,
    (head, at): (usize, usize),
    x: &[f32],
) -> Option<Vec<f32>> {
    let (layout, of) = (Layout::new(heads.head_dim, bits), HeadCodes::new(heads.head_dim, bits)?);
    let (mut codes, mut scales) = (vec![0; of.bytes()], vec![0.0; of.groups()]);
    let (mut zeros, mut values) = (vec![0; of.groups()], vec![0.0; x.len()]);
    if !of.quantize(x, 1, &mut codes, &mut scales, &mut zeros) {
        return None;
    }
    of.dequantize_tokens(&codes, &scales, &zeros, &mut values);
    let rows = heads.kv_heads * capacity.next_multiple_of(8);
    let row = head * capacity.next_multiple_of(8) + at;
    let mask = if bits == 8 { u8::MAX } else { 15 };
    let place = |byte: usize| match is_key {
        true => row * layout.bytes + byte,
        false => (row - at % 8) * layout.bytes + 8 * byte + at % 8,
    };
    (0..layout.bytes).for_each(|byte| memory[place(byte)] = 0);
    for feature in 0..x.len() {
        let from = of.place(feature);
        let (byte, shift) = layout.place(feature);
        memory[place(byte)] |= ((codes[from.byte] >> from.shift) & mask) << shift;
    }
    for (group, (scale, zero)) in scales.iter().zip(zeros).enumerate() {
        let grid = row * layout.groups + group;
        memory[rows * layout.bytes + 4 * grid..][..4].copy_from_slice(&scale.to_le_bytes());
        memory[rows * (layout.bytes + 4 * layout.groups) + grid] = zero;
    }
    Some(values)
}

/// A sum of products in the order of the `mma` of kernels/cuda/attention.cu.
fn in_order(count: usize, pair: impl Fn(usize) -> (f32, f32)) -> f32 {
    let mut sum = 0.0f32;
    for i in 0..count.next_multiple_of(32) {
        // Of 32: two `mma`, of each two halves, four lanes, a pair.
        let at = i / 32 * 32 + 8 * (i / 2 % 4) + 4 * (i / 16 % 2) + 2 * (i / 8 % 2) + i % 2;
        if at < count {
            let (a, b) = pair(at);
            sum = a.mul_add(b, sum);
        }
    }
    sum
}

/// Keys and values as a cache holds them.
#[derive(Clone, Copy, Debug)]
pub struct Past<'a> {
    /// The keys, by [`key_place`].
    pub keys: &'a [u16],
    /// The values, by [`value_place`].
    pub values: &'a [u16],
    /// Positions.
    pub capacity: usize,
}

/// `c tanh(x / c)` by the operations of kernels/cuda/device.cuh.
#[must_use]
pub fn soft_capped(x: f32, cap: f32) -> f32 {
    cap * (1.0 - 2.0 / (cpu::exp(2.0 * x / cap) + 1.0))
}

/// What a query head (its features `query`, of which head `kv` are keys and values) attends to at position `last`, BF16.
#[must_use]
#[expect(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attend(
    heads: Heads,
    query: &[f32],
    kv: usize,
    past: Past<'_>,
    last: usize,
    window: Option<usize>,
    scale: f32,
    cap: Option<f32>,
) -> Vec<u16> {
    let d = heads.head_dim;
    let first = window.map_or(0, |w| (last + 1).saturating_sub(w));
    let query: Vec<f32> = query.iter().map(|q| widen(round(q * scale))).collect();
    // The last sum is that of the probabilities.
    let (mut largest, mut sums) = (f32::NEG_INFINITY, vec![0.0f32; d + 1]);
    for base in (first / TILE * TILE..=last).step_by(TILE) {
        let seen = |at: usize| at >= first && at <= last;
        let key = |at: usize, i: usize| widen(past.keys[key_place(past.capacity, d, kv, at, i)]);
        let scores: Vec<f32> = (base..base + TILE)
            .map(|at| {
                let score = || in_order(d, |i| (query[i], key(at, i)));
                if seen(at) {
                    cap.map_or_else(score, |cap| soft_capped(score(), cap))
                } else {
                    f32::NEG_INFINITY
                }
            })
            .collect();
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
        let p: Vec<f32> = scores
            .iter()
            .map(|s| if *s == f32::NEG_INFINITY { 0.0 } else { widen(round(cpu::exp(s - top))) })
            .collect();
        let now = if top > largest { top } else { largest };
        let factor = |from: f32| if from == now { 1.0 } else { cpu::exp(from - now) };
        let (kept, brought) = (factor(largest), if top == f32::NEG_INFINITY { 0.0 } else { factor(top) });
        for (i, sum) in sums.iter_mut().enumerate() {
            let value = |at: usize| match (i == d, seen(at)) {
                (true, _) => 1.0,
                (false, true) => widen(past.values[value_place(past.capacity, d, kv, at, i)]),
                (false, false) => 0.0,
            };
            let of_tile = in_order(TILE, |at| (p[at], value(base + at)));
            *sum = sum.mul_add(kept, of_tile * brought);
        }
        largest = now;
    }
    sums[..d].iter().map(|s| round(s / sums[d])).collect()
}
