//! Keys and values of the tokens so far.
//!
//! ```text
//! keys    of a head: token x feature      a row a token:    scores  = K q
//! values  of a head: feature x token      a row a feature:  outputs = V p
//! ```

use crate::Panels;

/// The key and value cache of one sequence. A layer whose attention is skipped takes no memory.
#[derive(Debug)]
pub struct Cache {
    capacity: usize,
    length: usize,
    expected: usize,
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
            expected: 0,
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
        (self.length, self.expected) = (0, 0);
    }

    /// Says that a sequence of at least `length` tokens is to come: rotary embeddings that depend on the length
    /// are those of the whole then, in however many pieces it is read.
    pub fn expect(&mut self, length: usize) {
        self.expected = length;
    }

    /// The length that was announced.
    pub(crate) fn expected(&self) -> usize {
        self.expected
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
        let (first, capacity) = (self.length, self.capacity);
        let layer = &mut self.layers[layer];
        if layer.keys.is_empty() {
            layer.keys = vec![0.0; k.features() * capacity];
            layer.values = vec![0.0; k.features() * capacity];
            (layer.capacity, layer.head_dim) = (capacity, head_dim);
        }
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
