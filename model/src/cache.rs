//! Keys and values of the tokens so far.
//!
//! ```text
//! keys    of a head: token x feature      a row a token:    scores  = K q
//! values  of a head: feature x token      a row a feature:  outputs = V p
//!
//! plain.rs       in single precision
//! coded.rs       as codes of 8 or 4 bits
//! recurrent.rs   of layers that remember: a state in their place
//! ```

mod coded;
mod plain;
mod recurrent;

use llmpress_kernels::cpu::HeadCodes;

use crate::Panels;
use coded::Coded;
use plain::Plain;
pub(crate) use recurrent::Recurrent;

/// Tokens that a layer has room for at first.
const FIRST_CAPACITY: usize = 64;

/// The key and value cache of one sequence. It takes memory as the sequence grows; a layer whose attention is
/// skipped takes none.
#[derive(Debug)]
pub struct Cache {
    capacity: usize,
    length: usize,
    announced: usize,
    codes: Option<HeadCodes>,
    layers: Vec<LayerCache>,
    /// Of layers that remember; the others have none.
    states: Vec<Recurrent>,
}

/// The keys and values of a layer.
#[derive(Debug)]
pub(crate) enum LayerCache {
    Plain(Plain),
    Coded(Coded),
}

impl Cache {
    /// For up to `capacity` tokens of a model of `layers` layers, whose keys and values become codes, or stay in single precision.
    pub(crate) fn new(layers: usize, capacity: usize, codes: Option<HeadCodes>) -> Self {
        let layer = |_| match codes {
            None => LayerCache::Plain(Plain::default()),
            Some(codes) => LayerCache::Coded(Coded::new(codes)),
        };
        let states = (0..layers).map(|_| Recurrent::default()).collect();
        Self { capacity, length: 0, announced: 0, codes, layers: (0..layers).map(layer).collect(), states }
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

    /// How it holds keys and values; none: in single precision.
    pub(crate) fn codes(&self) -> Option<HeadCodes> {
        self.codes
    }

    /// Bytes that keys and values take, scales and zero points included, and the states of layers that remember.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let of_layer = |layer: &LayerCache| match layer {
            LayerCache::Plain(plain) => plain.bytes(),
            LayerCache::Coded(coded) => coded.bytes(),
        };
        let states: usize = self.states.iter().map(Recurrent::bytes).sum();
        self.layers.iter().map(of_layer).sum::<usize>() + states
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.length += tokens;
    }

    /// What a layer remembers.
    pub(crate) fn recurrent(&mut self, layer: usize) -> &mut Recurrent {
        &mut self.states[layer]
    }

    /// Adds a layer's keys, `kv_heads * head_dim` features of the tokens from [`Self::len`] on, and as many heads of values.
    ///
    /// # Errors
    /// What cannot become codes, as it is NaN or infinite: keys or values.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        k: &Panels,
        v: &Panels,
        head_dim: usize,
    ) -> Result<&LayerCache, &'static str> {
        let (first, limit) = (self.length, self.capacity);
        let layer = &mut self.layers[layer];
        match layer {
            LayerCache::Plain(plain) => plain.append(first, limit, k, v, head_dim),
            LayerCache::Coded(coded) => coded.append(first, limit, k, v)?,
        }
        Ok(layer)
    }
}

impl LayerCache {
    /// What a query head of `width` tokens, `query[feature * width + token]`, takes of the keys of a head from token `first` on:
    /// `scores[key * width + token]`, for as many keys as there is room for.
    pub(crate) fn scores(&self, head: usize, first: usize, query: &[f32], width: usize, scores: &mut [f32]) {
        match self {
            Self::Plain(plain) => plain.scores(head, first, query, width, scores),
            Self::Coded(coded) => coded.scores(head, first, query, width, scores),
        }
    }

    /// The sums of the values of a head from token `first` on, each by its weight in `weights[value * width + token]`:
    /// `out[feature * width + token]`.
    pub(crate) fn outputs(&self, head: usize, first: usize, weights: &[f32], width: usize, out: &mut [f32]) {
        match self {
            Self::Plain(plain) => plain.outputs(head, first, weights, width, out),
            Self::Coded(coded) => coded.outputs(head, first, weights, width, out),
        }
    }
}

/// Room for `needed` tokens, of at most `limit`, where there is some for `capacity`.
fn grown(needed: usize, capacity: usize, limit: usize) -> usize {
    needed.max(2 * capacity).max(FIRST_CAPACITY).min(limit.max(needed))
}

/// Makes `rows` rows of `to` elements of rows of `from`, of which the first `held` stay.
fn lengthen<T: Copy + Default>(all: &mut Vec<T>, rows: usize, from: usize, to: usize, held: usize) {
    let mut longer = vec![T::default(); rows * to];
    if held > 0 {
        for (to, from) in longer.chunks_exact_mut(to).zip(all.chunks_exact(from)) {
            to[..held].copy_from_slice(&from[..held]);
        }
    }
    *all = longer;
}

#[cfg(test)]
mod tests {
    use llmpress_kernels::cpu::{PANEL, quantize_columns};
    use llmpress_numbers::Numbers;

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
        let mut cache = Cache::new(1, tokens, None);
        let mut at = 0;
        for step in [1, 60, 3, 1, 1, 100, 334] {
            cache.append(0, &panels(at, at + step, 1.0), &panels(at, at + step, -1.0), d).unwrap();
            cache.advance(step);
            at += step;
        }
        assert_eq!(at, tokens);
        let layer = &cache.layers[0];
        for head in 0..heads {
            for token in 0..tokens {
                for i in 0..d {
                    let expected = (token * 100 + head * d + i) as f32;
                    let mut query = vec![0.0; d];
                    query[i] = 1.0;
                    let (mut score, mut out) = ([0.0], vec![0.0; d]);
                    layer.scores(head, token, &query, 1, &mut score);
                    layer.outputs(head, token, &[1.0], 1, &mut out);
                    assert_eq!((score[0], out[i]), (expected, -expected));
                }
            }
        }
        assert_eq!(cache.bytes(), 2 * 4 * heads * d * tokens, "no more than the capacity");
    }

    /// Heads rounded as a cache holds them.
    fn rounded(x: &Panels, heads: usize, d: usize, bits: u8) -> Panels {
        let mut x = x.clone();
        for panel in 0..x.count() {
            let width = x.width(panel);
            let all = x.panel_mut(panel);
            for head in 0..heads {
                for group in all[head * d * width..][..d * width].chunks_mut(HeadCodes::GROUP * width) {
                    assert!(quantize_columns(group, width, bits));
                }
            }
        }
        x
    }

    #[test]
    fn codes_attend_to_the_bit_as_the_values_they_stand_for() {
        let mut numbers = Numbers::new(3);
        for (heads, d, steps) in [
            (1, 1, &[1][..]),
            (2, 20, &[1, 1, 70, 3]),
            (1, 64, &[200, 1]),
            (2, 129, &[5, 60, 1]),
            (3, 256, &[2, 65]),
        ] {
            for bits in [4, 8] {
                let tokens: usize = steps.iter().sum();
                let codes = HeadCodes::new(d, bits).unwrap();
                let (mut coded, mut plain) =
                    (Cache::new(1, tokens, Some(codes)), Cache::new(1, tokens, None));
                let mut all = [Panels::zeros(heads * d, tokens), Panels::zeros(heads * d, tokens)];
                for step in steps {
                    let mut make = || {
                        let mut x = Panels::zeros(heads * d, *step);
                        x.data_mut().iter_mut().for_each(|x| *x = 3.0 * numbers.float() + 0.5);
                        x
                    };
                    let (k, v) = (make(), make());
                    for (all, x) in all.iter_mut().zip([&k, &v]) {
                        (0..*step).for_each(|token| all.set_token(coded.len() + token, x.token(token)));
                    }
                    coded.append(0, &k, &v, d).unwrap();
                    plain.append(0, &rounded(&k, heads, d, bits), &rounded(&v, heads, d, bits), d).unwrap();
                    coded.advance(*step);
                    plain.advance(*step);
                }
                let mut at_once = Cache::new(1, tokens, Some(codes));
                at_once.append(0, &all[0], &all[1], d).unwrap();
                for (head, first, width) in
                    [(0, 0, 1), (heads - 1, tokens / 2, 1), (heads - 1, tokens / 3, PANEL), (0, 0, 5)]
                {
                    let query: Vec<f32> = (0..d * width).map(|_| numbers.float()).collect();
                    let seen = tokens - first;
                    let run = |cache: &Cache| {
                        let (mut scores, mut out) = (vec![f32::NAN; seen * width], vec![f32::NAN; d * width]);
                        cache.layers[0].scores(head, first, &query, width, &mut scores);
                        cache.layers[0].outputs(head, first, &scores, width, &mut out);
                        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        (bits(&scores), bits(&out))
                    };
                    let case = format!("{bits} bits, {heads} x {d}, {steps:?}, {width}");
                    assert!(run(&coded) == run(&plain), "{case}");
                    assert!(run(&at_once) == run(&coded), "{case}: however a sequence is cut");
                }
                // What is stated: a byte or half a one for each value, and five for each group.
                let head = if bits == 8 { d } else { d.div_ceil(2) } + 5 * d.div_ceil(128);
                assert_eq!(coded.bytes(), 2 * heads * head * tokens);
            }
        }
    }

    #[test]
    fn what_cannot_become_codes_is_told() {
        let codes = HeadCodes::new(2, 4).unwrap();
        let mut cache = Cache::new(1, 4, Some(codes));
        let (good, mut bad) = (Panels::zeros(4, 3), Panels::zeros(4, 3));
        bad.data_mut()[7] = f32::INFINITY;
        assert_eq!(cache.append(0, &bad, &good, 2).unwrap_err(), "key");
        assert_eq!(cache.append(0, &good, &bad, 2).unwrap_err(), "value");
        assert!(cache.append(0, &good, &good, 2).is_ok());
    }
}
