//! Keys and values in single precision.

use llmpress_kernels::cpu::{Elements, dot_rows, multiply};

use super::{grown, lengthen};
use crate::Panels;

/// Of a layer.
#[derive(Debug, Default)]
pub(crate) struct Plain {
    /// `[heads, capacity, head_dim]`.
    keys: Vec<f32>,
    /// `[heads, value_dim, capacity]`.
    values: Vec<f32>,
    capacity: usize,
    head_dim: usize,
    value_dim: usize,
}

impl Plain {
    pub(super) fn bytes(&self) -> usize {
        4 * (self.keys.len() + self.values.len())
    }

    /// Adds tokens from `first` on, of at most `limit`.
    pub(super) fn append(&mut self, first: usize, limit: usize, k: &Panels, v: &Panels, head_dim: usize) {
        let heads = k.features() / head_dim;
        self.reserve(first, first + k.tokens(), limit, heads, head_dim, v.features() / heads.max(1));
        let capacity = self.capacity;
        for panel in 0..k.count() {
            let (range, width) = (k.range(panel), k.width(panel));
            for (feature, values) in v.panel(panel).chunks_exact(width).enumerate() {
                let start = feature * capacity + first + range.start;
                self.values[start..start + width].copy_from_slice(values);
            }
            for (feature, keys) in k.panel(panel).chunks_exact(width).enumerate() {
                let head = feature / head_dim * head_dim * capacity;
                let start = head + (first + range.start) * head_dim + feature % head_dim;
                for (key, to) in keys.iter().zip(self.keys[start..].iter_mut().step_by(head_dim)) {
                    *to = *key;
                }
            }
        }
    }

    fn reserve(
        &mut self,
        held: usize,
        needed: usize,
        limit: usize,
        heads: usize,
        head_dim: usize,
        value_dim: usize,
    ) {
        if needed <= self.capacity {
            return;
        }
        let (from, to) = (self.capacity, grown(needed, self.capacity, limit));
        lengthen(&mut self.keys, heads, head_dim * from, head_dim * to, head_dim * held);
        lengthen(&mut self.values, heads * value_dim, from, to, held);
        (self.capacity, self.head_dim, self.value_dim) = (to, head_dim, value_dim);
    }

    /// As [`super::LayerCache::scores`].
    pub(super) fn scores(&self, head: usize, first: usize, query: &[f32], width: usize, scores: &mut [f32]) {
        let d = self.head_dim;
        let keys = &self.keys[(head * self.capacity + first) * d..(head + 1) * self.capacity * d];
        rows_times(keys, d, query, width, scores);
    }

    /// As [`super::LayerCache::outputs`].
    pub(super) fn outputs(&self, head: usize, first: usize, weights: &[f32], width: usize, out: &mut [f32]) {
        let size = self.capacity * self.value_dim;
        rows_times(&self.values[head * size + first..(head + 1) * size], self.capacity, weights, width, out);
    }
}

/// Rows that are `stride` apart times a panel of `width` tokens.
pub(super) fn rows_times(rows: &[f32], stride: usize, x: &[f32], width: usize, out: &mut [f32]) {
    if width == 1 {
        dot_rows(Elements::F32(rows), stride, x, out);
    } else {
        multiply(rows, stride, x, width, out);
    }
}
