//! Gated delta layers: a memory of fixed size in the place of keys and values (Yang et al., Gated Delta Networks, equation 10).
//!
//! ```text
//! x --> q, k, v --> short convolution of each channel, silu      x --> z, b, a
//! of each head:  S <- e^g S + k (beta (v - k S))^T,  o = q S     g = -e^A softplus(a + dt),  beta = sigmoid(b)
//! norm(o) silu(z) --> out
//! ```
//!
//! `q` and `k` are of length one, `q` by the root of its size too. Tokens are read one after the other, so it does not matter in which pieces
//! a sequence comes.

use llmpress_formats::{Checkpoint, Error, Result};
use llmpress_kernels::cpu::exp;
use rayon::prelude::*;

use crate::linear::{Linear, Product, multiply_all, multiply_side_by_side};
use crate::side_by_side::Stream;
use crate::{Cache, Observer, Panels};

/// Added to the square of the length of queries and keys.
const LENGTH_EPS: f32 = 1e-6;
/// Channels that a thread convolves at a time.
const CHANNELS: usize = 64;

/// Sizes of a gated delta layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaConfig {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of these.
    pub value_heads: usize,
    /// Features of a query or key.
    pub key_dim: usize,
    /// Features of a value.
    pub value_dim: usize,
    /// Tokens that the convolution sees, the present one included.
    pub kernel: usize,
}

impl DeltaConfig {
    /// Channels of the convolution: all queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.values()
    }

    /// Features of all values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Value heads of a key head.
    fn group(&self) -> usize {
        self.value_heads / self.key_heads.max(1)
    }

    fn memory(&self) -> usize {
        self.key_dim * self.value_dim
    }

    /// Bytes of a sequence's state.
    pub fn state_bytes(&self) -> usize {
        4 * (self.channels() * (self.kernel - 1) + self.value_heads * self.memory())
    }
}

/// The matrices that read the residual stream.
#[derive(Debug)]
pub(crate) enum Inputs {
    /// Of each key head query, key, values and gates in one; beta and a of its value heads in another.
    Grouped(Box<[Linear; 2]>),
    /// All queries, keys and values; gates; beta; a.
    Separate(Box<[Linear; 4]>),
}

/// The weights of a gated delta layer.
#[derive(Debug)]
pub(crate) struct Delta {
    pub(crate) config: DeltaConfig,
    pub(crate) inputs: Inputs,
    /// `[channels, kernel]`.
    pub(crate) convolution: Vec<f32>,
    /// `-e^A` of each value head.
    pub(crate) rates: Vec<f32>,
    /// What is added to `a` of each value head.
    pub(crate) steps: Vec<f32>,
    /// Weights of the norm of each head's output.
    pub(crate) norm: Vec<f32>,
    pub(crate) eps: f32,
    pub(crate) output: Linear,
}

/// Activations, kept from layer to layer for their memory.
#[derive(Default)]
pub(crate) struct Workspace {
    products: [Panels; 4],
    convolved: Vec<f32>,
    results: Vec<f32>,
    heads: Panels,
}

/// What of the products a head needs: the panels, and where its features lie.
struct Places {
    gate: (usize, usize),
    beta: (usize, usize),
    a: (usize, usize),
}

impl Delta {
    /// The matrices that read the normed residual stream.
    pub(crate) fn readers(&self) -> &[Linear] {
        match &self.inputs {
            Inputs::Grouped(all) => &all[..],
            Inputs::Separate(all) => &all[..],
        }
    }

    /// All matrices.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.readers().iter().chain([&self.output])
    }

    /// All matrices, to be changed.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let readers = match &mut self.inputs {
            Inputs::Grouped(all) => &mut all[..],
            Inputs::Separate(all) => &mut all[..],
        };
        readers.iter_mut().chain([&mut self.output])
    }

    /// `out = delta(x)` for tokens that follow those in the cache.
    #[expect(clippy::too_many_arguments, reason = "what a layer depends on")]
    pub(crate) fn forward(
        &self,
        checkpoint: &Checkpoint,
        layer: usize,
        x: &Panels,
        cache: &mut Cache,
        observer: &mut dyn Observer,
        w: &mut Workspace,
        out: &mut Panels,
    ) -> Result<()> {
        self.readers().iter().for_each(|linear| observer.linear_input(linear.tensor(), x));
        let pairs = self.readers().iter().zip(&mut w.products);
        let mut products: Vec<_> = pairs.map(|(linear, out)| Product::new(linear, x, out)).collect();
        multiply_all(checkpoint, &mut products)?;
        self.mix(checkpoint, layer, cache, w)?;
        observer.linear_input(self.output.tensor(), &w.heads);
        multiply_all(checkpoint, &mut [Product::new(&self.output, &w.heads, out)])
    }

    /// The same for one token of each of several sequences, each as it is by itself.
    pub(crate) fn forward_side_by_side(
        &self,
        checkpoint: &Checkpoint,
        layer: usize,
        streams: &mut [Stream<'_>],
    ) -> Result<()> {
        for (number, linear) in self.readers().iter().enumerate() {
            let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.delta.products[number])).collect();
            multiply_side_by_side(checkpoint, linear, pairs)?;
        }
        for s in &mut *streams {
            self.mix(checkpoint, layer, s.cache, &mut s.delta)?;
        }
        let pairs = streams.iter_mut().map(|s| (&s.delta.heads, &mut s.y)).collect();
        multiply_side_by_side(checkpoint, &self.output, pairs)
    }

    /// From what the matrices gave to what the heads give.
    fn mix(&self, checkpoint: &Checkpoint, layer: usize, cache: &mut Cache, w: &mut Workspace) -> Result<()> {
        let c = &self.config;
        let (first, tokens) = (cache.len(), w.products[0].tokens());
        let (past, all) = (c.channels() * (c.kernel - 1), c.value_heads * c.memory());
        let state = cache.recurrent(layer).begin(first, tokens, past, all).map_err(|at| {
            Error::Invalid(format!(
                "{}: layer {layer} remembers {at} tokens and no others, and cannot go on after {first}: read the sequence again from its start",
                checkpoint.root().display()
            ))
        })?;
        self.convolve(&w.products[0], tokens, &mut state.inputs, &mut w.convolved);
        w.results.resize(tokens * c.values(), 0.0);
        let (products, convolved) = (&w.products, &w.convolved);
        let heads =
            state.memory.par_chunks_mut(c.memory()).zip(w.results.par_chunks_mut(tokens * c.value_dim));
        heads.enumerate().for_each(|(head, (memory, out))| self.head(head, products, convolved, memory, out));
        w.heads.resize(c.values(), tokens);
        for panel in 0..w.heads.count() {
            let (range, width) = (w.heads.range(panel), w.heads.width(panel));
            for (feature, line) in w.heads.panel_mut(panel).chunks_exact_mut(width).enumerate() {
                let (head, of_head) = (feature / c.value_dim, feature % c.value_dim);
                let results = &w.results[head * tokens * c.value_dim..];
                let results = results[range.start * c.value_dim + of_head..].iter().step_by(c.value_dim);
                line.iter_mut().zip(results).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(())
    }

    /// The feature of the first product that is a channel of the convolution: all queries, then all keys, then all values.
    fn channel(&self, channel: usize) -> usize {
        let c = &self.config;
        let keys = c.key_heads * c.key_dim;
        match (&self.inputs, channel / keys) {
            (Inputs::Separate(_), _) => channel,
            (Inputs::Grouped(_), part @ (0 | 1)) => {
                let (head, feature) = (channel % keys / c.key_dim, channel % c.key_dim);
                head * self.block() + part * c.key_dim + feature
            }
            (Inputs::Grouped(_), _) => {
                let value = channel - 2 * keys;
                self.value(value / c.value_dim, 0) + value % c.value_dim
            }
        }
    }

    /// Features of a key head in the first product, where it has all.
    fn block(&self) -> usize {
        2 * (self.config.key_dim + self.config.group() * self.config.value_dim)
    }

    /// The first feature of a value head (0) or of its gate (1) there.
    fn value(&self, head: usize, part: usize) -> usize {
        let (c, group) = (&self.config, self.config.group());
        let within = 2 * c.key_dim + (part * group + head % group) * c.value_dim;
        head / group * self.block() + within
    }

    /// Where a value head finds its gate, beta and a.
    fn places(&self, head: usize) -> Places {
        let group = self.config.group();
        match &self.inputs {
            Inputs::Grouped(_) => {
                let first = head / group * 2 * group + head % group;
                Places { gate: (0, self.value(head, 1)), beta: (1, first), a: (1, first + group) }
            }
            Inputs::Separate(_) => {
                Places { gate: (1, head * self.config.value_dim), beta: (2, head), a: (3, head) }
            }
        }
    }

    /// The convolution of each channel with its own past: `out[channel * tokens + token]`.
    fn convolve(&self, inputs: &Panels, tokens: usize, past: &mut [f32], out: &mut Vec<f32>) {
        let kernel = self.config.kernel;
        out.resize(self.config.channels() * tokens, 0.0);
        let parts = past.par_chunks_mut(CHANNELS * (kernel - 1)).zip(out.par_chunks_mut(CHANNELS * tokens));
        parts.enumerate().for_each(|(part, (past, out))| {
            let mut line = vec![0.0; kernel - 1 + tokens];
            for (i, (past, out)) in
                past.chunks_exact_mut(kernel - 1).zip(out.chunks_exact_mut(tokens)).enumerate()
            {
                let channel = part * CHANNELS + i;
                let feature = self.channel(channel);
                line[..kernel - 1].copy_from_slice(past);
                for panel in 0..inputs.count() {
                    let (range, width) = (inputs.range(panel), inputs.width(panel));
                    line[kernel - 1 + range.start..][..width]
                        .copy_from_slice(&inputs.panel(panel)[feature * width..][..width]);
                }
                let weights = &self.convolution[channel * kernel..][..kernel];
                for (out, seen) in out.iter_mut().zip(line.windows(kernel)) {
                    *out = silu(seen.iter().zip(weights).map(|(x, w)| x * w).sum());
                }
                past.copy_from_slice(&line[tokens..]);
            }
        });
    }

    /// All tokens of a value head: `out[token * value_dim + feature]`.
    fn head(
        &self,
        head: usize,
        products: &[Panels; 4],
        convolved: &[f32],
        memory: &mut [f32],
        out: &mut [f32],
    ) {
        let c = &self.config;
        let tokens = out.len() / c.value_dim;
        let (keys, key_head) = (c.key_heads * c.key_dim, head / c.group());
        let places = self.places(head);
        let at = |(product, feature): (usize, usize), token| products[product].get(feature, token);
        let (mut q, mut k) = (vec![0.0; c.key_dim], vec![0.0; c.key_dim]);
        let mut change = vec![0.0; c.value_dim];
        for (token, out) in out.chunks_exact_mut(c.value_dim).enumerate() {
            let channels = |first: usize| convolved[first * tokens + token..].iter().step_by(tokens);
            for (part, to) in [&mut q, &mut k].into_iter().enumerate() {
                let from = channels(part * keys + key_head * c.key_dim);
                to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                let length = to.iter().map(|x| x * x).sum::<f32>() + LENGTH_EPS;
                let scale = 1.0 / length.sqrt() * if part == 0 { (c.key_dim as f32).powf(-0.5) } else { 1.0 };
                to.iter_mut().for_each(|x| *x *= scale);
            }
            let decay = exp(self.rates[head] * softplus(at(places.a, token) + self.steps[head]));
            let beta = 1.0 / (1.0 + exp(-at(places.beta, token)));
            change.fill(0.0);
            for (row, k) in memory.chunks_exact_mut(c.value_dim).zip(&k) {
                for (known, sum) in row.iter_mut().zip(&mut change) {
                    *known *= decay;
                    *sum += *known * k;
                }
            }
            let values = channels(2 * keys + head * c.value_dim);
            change.iter_mut().zip(values).for_each(|(known, value)| *known = (value - *known) * beta);
            out.fill(0.0);
            for ((row, k), q) in memory.chunks_exact_mut(c.value_dim).zip(&k).zip(&q) {
                for ((known, change), out) in row.iter_mut().zip(&change).zip(&mut *out) {
                    *known += k * change;
                    *out += q * *known;
                }
            }
            let mean = out.iter().map(|x| x * x).sum::<f32>() / c.value_dim as f32;
            let scale = 1.0 / (mean + self.eps).sqrt();
            for (feature, (out, weight)) in out.iter_mut().zip(&self.norm).enumerate() {
                let gate = at((places.gate.0, places.gate.1 + feature), token);
                *out = *out * scale * weight * silu(gate);
            }
        }
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `ln(1 + e^x)`.
fn softplus(x: f32) -> f32 {
    let x = f64::from(x);
    (x.max(0.0) + (-x.abs()).exp().ln_1p()) as f32
}
