//! Keys and values as codes of 8 or 4 bits ([`HeadCodes`]): what is read is made single precision a few rows at a time.
//!
//! ```text
//! keys    [heads][tokens][bytes]     scales and zero points [heads][tokens][groups]
//! values  [heads][bytes][tokens]     scales and zero points [heads][groups][tokens]
//! ```

use std::cell::RefCell;

use llmpress_kernels::cpu::{HeadCodes, PANEL};

use super::plain::rows_times;
use super::{grown, lengthen};
use crate::Panels;

/// Keys that are made single precision at a time: a first-level cache holds them.
const KEYS: usize = 32;
/// Features of all values that are.
const FEATURES: usize = 8;

/// Of a layer.
#[derive(Debug)]
pub(crate) struct Coded {
    of: HeadCodes,
    capacity: usize,
    keys: Rows,
    values: Rows,
}

/// Codes with their scales and zero points.
#[derive(Debug, Default)]
struct Rows {
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl Rows {
    fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len() + self.zeros.len()
    }

    /// Lengthens rows, of codes `by[0]` a token and of grids `by[1]`.
    fn lengthen(&mut self, rows: [usize; 2], by: [usize; 2], from: usize, to: usize, held: usize) {
        lengthen(&mut self.codes, rows[0], by[0] * from, by[0] * to, by[0] * held);
        lengthen(&mut self.scales, rows[1], by[1] * from, by[1] * to, by[1] * held);
        lengthen(&mut self.zeros, rows[1], by[1] * from, by[1] * to, by[1] * held);
    }
}

impl Coded {
    pub(super) fn new(of: HeadCodes) -> Self {
        Self { of, capacity: 0, keys: Rows::default(), values: Rows::default() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// Adds tokens from `first` on, of at most `limit`. Which of them cannot become codes is the error.
    pub(super) fn append(
        &mut self,
        first: usize,
        limit: usize,
        k: &Panels,
        v: &Panels,
    ) -> Result<(), &'static str> {
        self.reserve(first, first + k.tokens(), limit, k.features() / self.of.features());
        let (bytes, groups, capacity) = (self.of.bytes(), self.of.groups(), self.capacity);
        let (mut codes, mut scales) = (vec![0; bytes * PANEL], vec![0.0; groups * PANEL]);
        let mut zeros = vec![0; groups * PANEL];
        for (x, name, is_key) in [(k, "key", true), (v, "value", false)] {
            let to = if is_key { &mut self.keys } else { &mut self.values };
            for panel in 0..x.count() {
                let (at, width) = (first + x.range(panel).start, x.width(panel));
                let codes = &mut codes[..bytes * width];
                let (scales, zeros) = (&mut scales[..groups * width], &mut zeros[..groups * width]);
                let heads = x.panel(panel).chunks_exact(self.of.features() * width);
                for (head, x) in heads.enumerate() {
                    if !self.of.quantize(x, width, codes, scales, zeros) {
                        return Err(name);
                    }
                    if is_key {
                        let token = head * capacity + at;
                        turn(codes, width, &mut to.codes[token * bytes..]);
                        turn(scales, width, &mut to.scales[token * groups..]);
                        turn(zeros, width, &mut to.zeros[token * groups..]);
                    } else {
                        place(codes, width, capacity, &mut to.codes[head * bytes * capacity + at..]);
                        place(scales, width, capacity, &mut to.scales[head * groups * capacity + at..]);
                        place(zeros, width, capacity, &mut to.zeros[head * groups * capacity + at..]);
                    }
                }
            }
        }
        Ok(())
    }

    fn reserve(&mut self, held: usize, needed: usize, limit: usize, heads: usize) {
        if needed <= self.capacity {
            return;
        }
        let (from, to) = (self.capacity, grown(needed, self.capacity, limit));
        let (bytes, groups) = (self.of.bytes(), self.of.groups());
        self.keys.lengthen([heads; 2], [bytes, groups], from, to, held);
        self.values.lengthen([heads * bytes, heads * groups], [1, 1], from, to, held);
        self.capacity = to;
    }

    /// As [`super::LayerCache::scores`].
    pub(super) fn scores(&self, head: usize, first: usize, query: &[f32], width: usize, scores: &mut [f32]) {
        let (d, bytes, groups) = (self.of.features(), self.of.bytes(), self.of.groups());
        SPACE.with_borrow_mut(|space| {
            space.resize(space.len().max(KEYS * d), 0.0);
            for (block, scores) in scores.chunks_mut(KEYS * width).enumerate() {
                let (from, count) = (head * self.capacity + first + block * KEYS, scores.len() / width);
                let rows = &mut space[..count * d];
                let grid = from * groups..(from + count) * groups;
                self.of.dequantize_tokens(
                    &self.keys.codes[from * bytes..(from + count) * bytes],
                    &self.keys.scales[grid.clone()],
                    &self.keys.zeros[grid],
                    rows,
                );
                rows_times(rows, d, query, width, scores);
            }
        });
    }

    /// As [`super::LayerCache::outputs`].
    pub(super) fn outputs(&self, head: usize, first: usize, weights: &[f32], width: usize, out: &mut [f32]) {
        let (d, bytes, groups) = (self.of.features(), self.of.bytes(), self.of.groups());
        let seen = weights.len() / width;
        let codes = &self.values.codes[head * bytes * self.capacity + first..];
        let grid = head * groups * self.capacity + first;
        let (scales, zeros) = (&self.values.scales[grid..], &self.values.zeros[grid..]);
        SPACE.with_borrow_mut(|space| {
            space.resize(space.len().max(FEATURES * seen), 0.0);
            for (block, out) in out.chunks_mut(FEATURES * width).enumerate() {
                let features = block * FEATURES..((block + 1) * FEATURES).min(d);
                let rows = &mut space[..features.len() * seen];
                self.of.dequantize_features(features, codes, scales, zeros, self.capacity, rows);
                rows_times(rows, seen, weights, width, out);
            }
        });
    }
}

/// `to[token * rows + row] = from[row * width + token]`.
fn turn<T: Copy>(from: &[T], width: usize, to: &mut [T]) {
    let rows = from.len() / width;
    for (row, from) in from.chunks_exact(width).enumerate() {
        for (from, to) in from.iter().zip(to[row..].iter_mut().step_by(rows)) {
            *to = *from;
        }
    }
}

/// Puts rows of `width` where rows are `stride` apart.
fn place<T: Copy>(from: &[T], width: usize, stride: usize, to: &mut [T]) {
    for (from, to) in from.chunks_exact(width).zip(to.chunks_mut(stride)) {
        to[..width].copy_from_slice(from);
    }
}

thread_local! {
    static SPACE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}
