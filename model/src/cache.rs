//! Keys and values of the tokens so far.
//!
//! ```text
//! keys    of a head: token x feature      a row a token:    scores  = K q
//! values  of a head: feature x token      a row a feature:  outputs = V p
//! ```

use crate::Panels;

/// Tokens that a layer has room for at first.
const FIRST_CAPACITY: usize = 64;

/// The key and value cache of one sequence. It takes memory as the sequence grows; a layer whose attention is
/// skipped takes none.
#[derive(Debug)]
pub struct Cache {
    capacity: usize,
    length: usize,
    announced: usize,
    layers: Vec<LayerCache>,
}

/// The keys and values of a layer.
#[derive(Debug, Default)]
pub(crate) struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    capacity: usize,
    head_dim: usize,
}

impl Cache {
    /// For up to `capacity` tokens of a model of `layers` layers.
    #[must_use]
    pub fn new(layers: usize, capacity: usize) -> Self {
        Self {
            capacity,
            length: 0,
            announced: 0,
            layers: (0..layers).map(|_| LayerCache::default()).collect(),
        }
    }

    /// Tokens that it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Most tokens that it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens and keeps the memory.
    pub fn clear(&mut self) {
        (self.length, self.announced) = (0, 0);
    }

    /// Says that a sequence of at least `length` tokens is to come: rotary embeddings that depend on the length
    /// are those of the whole then, in however many pieces it is read.
    pub fn announce(&mut self, length: usize) {
        self.announced = length;
    }

    /// The length that was announced.
    pub(crate) fn announced(&self) -> usize {
        self.announced
    }

    /// Bytes that keys and values take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| 4 * (l.keys.len() + l.values.len())).sum()
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.length += tokens;
    }

    /// Adds a layer's keys and values, `kv_heads * head_dim` features of the tokens from [`Self::len`] on.
    pub(crate) fn append(&mut self, layer: usize, k: &Panels, v: &Panels, head_dim: usize) -> &LayerCache {
        let first = self.length;
        let layer = &mut self.layers[layer];
        layer.reserve(first, first + k.tokens(), self.capacity, k.features(), head_dim);
        let capacity = layer.capacity;
        for panel in 0..k.count() {
            let (range, width) = (k.range(panel), k.width(panel));
            for (feature, (keys, values)) in
                k.panel(panel).chunks_exact(width).zip(v.panel(panel).chunks_exact(width)).enumerate()
            {
                let start = feature * capacity + first + range.start;
                layer.values[start..start + width].copy_from_slice(values);
                let head = feature / head_dim * head_dim * capacity;
                let start = head + (first + range.start) * head_dim + feature % head_dim;
                for (key, to) in keys.iter().zip(layer.keys[start..].iter_mut().step_by(head_dim)) {
                    *to = *key;
                }
            }
        }
        layer
    }
}

impl LayerCache {
    /// Makes room for `needed` tokens, of at most `limit`, and keeps the `held` ones.
    fn reserve(&mut self, held: usize, needed: usize, limit: usize, features: usize, head_dim: usize) {
        if needed <= self.capacity {
            return;
        }
        let capacity = needed.max(2 * self.capacity).max(FIRST_CAPACITY).min(limit.max(needed));
        let mut keys = vec![0.0; features * capacity];
        let mut values = vec![0.0; features * capacity];
        if self.capacity > 0 {
            for (to, from) in
                keys.chunks_mut(head_dim * capacity).zip(self.keys.chunks(head_dim * self.capacity))
            {
                to[..held * head_dim].copy_from_slice(&from[..held * head_dim]);
            }
            for (to, from) in values.chunks_mut(capacity).zip(self.values.chunks(self.capacity)) {
                to[..held].copy_from_slice(&from[..held]);
            }
        }
        *self = Self { keys, values, capacity, head_dim };
    }

    /// Keys of a head from token `first` on: rows of `head_dim`.
    pub(crate) fn keys(&self, head: usize, first: usize) -> &[f32] {
        let size = self.capacity * self.head_dim;
        &self.keys[head * size + first * self.head_dim..(head + 1) * size]
    }

    /// Values of a head from token `first` on: rows [`Self::stride`] apart.
    pub(crate) fn values(&self, head: usize, first: usize) -> &[f32] {
        let size = self.capacity * self.head_dim;
        &self.values[head * size + first..(head + 1) * size]
    }

    /// Distance of the rows of values.
    pub(crate) fn stride(&self) -> usize {
        self.capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_keeps_what_is_there() {
        let (heads, d, tokens) = (3, 4, 500);
        let panels = |from: usize, to: usize, sign: f32| {
            let mut panels = Panels::zeros(heads * d, to - from);
            for token in from..to {
                panels.set_token(token - from, (0..heads * d).map(|f| sign * (token * 100 + f) as f32));
            }
            panels
        };
        let mut cache = Cache::new(1, tokens);
        let mut at = 0;
        for step in [1, 60, 3, 1, 1, 100, 334] {
            cache.append(0, &panels(at, at + step, 1.0), &panels(at, at + step, -1.0), d);
            cache.advance(step);
            at += step;
        }
        assert_eq!(at, tokens);
        let layer = &cache.layers[0];
        for head in 0..heads {
            for token in 0..tokens {
                for i in 0..d {
                    let expected = (token * 100 + head * d + i) as f32;
                    assert_eq!(layer.keys(head, token)[i], expected);
                    assert_eq!(layer.values(head, token)[i * layer.stride()], -expected);
                }
            }
        }
        assert_eq!(cache.bytes(), 2 * 4 * heads * d * tokens, "no more than the capacity");
    }
}
