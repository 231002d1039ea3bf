//! Self-attention with grouped queries, a cache, and windows (Vaswani et al., section 3.2; Ainslie et al., GQA).
//!
//! ```text
//! scores (past tokens x tokens of a panel) = K q      softmax down each column      outputs = V scores
//! ```

use std::cell::RefCell;

use llmpress_formats::{Checkpoint, Error, Result};
use llmpress_kernels::cpu::{HeadCodes, rms_norm, softmax};
use rayon::prelude::*;

use crate::cache::LayerCache;
use crate::linear::{Linear, Product, multiply_all, multiply_side_by_side};
use crate::norm::Norm;
use crate::online::quantize_heads;
use crate::rope::Rotation;
use crate::side_by_side::Stream;
use crate::{Cache, ModelConfig, Observer, Panels, soft_cap};

/// The weights of a layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) projections: Projections,
    pub(crate) output: Linear,
    pub(crate) qk_norm: HeadNorms,
    pub(crate) window: Option<usize>,
    pub(crate) rope: usize,
}

/// Norms of query and key.
#[derive(Debug)]
pub(crate) enum HeadNorms {
    None,
    /// Of each head's.
    Heads(Vec<f32>, Vec<f32>),
    /// Of all heads' together.
    Whole(Norm, Norm),
}

/// Query, key and value.
#[derive(Debug)]
pub(crate) enum Projections {
    Separate(Box<[Linear; 3]>),
    /// All in one matrix, in this order.
    Fused(Linear),
}

/// Activations of attention, kept from layer to layer for their memory.
#[derive(Default)]
pub(crate) struct Workspace {
    q: Panels,
    k: Panels,
    v: Panels,
    fused: Panels,
    heads: Panels,
}

impl Projections {
    /// The matrices.
    pub(crate) fn linears(&self) -> &[Linear] {
        match self {
            Self::Separate(all) => &all[..],
            Self::Fused(one) => std::slice::from_ref(one),
        }
    }
}

impl Workspace {
    /// Query, key and value of what a fused matrix gave.
    fn split(&mut self, config: &ModelConfig) {
        let mut from = 0;
        for (to, heads) in
            [(&mut self.q, config.heads), (&mut self.k, config.kv_heads), (&mut self.v, config.kv_heads)]
        {
            copy_features(&self.fused, from, heads * config.head_dim, to);
            from += heads * config.head_dim;
        }
    }
}

impl Attention {
    /// Its matrices.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.projections.linears().iter().chain([&self.output])
    }

    /// Its matrices, to be changed.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let projections = match &mut self.projections {
            Projections::Separate(all) => &mut all[..],
            Projections::Fused(one) => std::slice::from_mut(one),
        };
        projections.iter_mut().chain([&mut self.output])
    }

    /// `out = attention(x)` for tokens that follow those in the cache.
    #[expect(clippy::too_many_arguments, reason = "what a layer's attention depends on")]
    pub(crate) fn forward(
        &self,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        qkv_bits: Option<u8>,
        layer: usize,
        x: &Panels,
        rotations: &[Rotation],
        cache: &mut Cache,
        observer: &mut dyn Observer,
        w: &mut Workspace,
        out: &mut Panels,
    ) -> Result<()> {
        match &self.projections {
            Projections::Separate(linears) => {
                let [q, k, v] = &**linears;
                [q, k, v].iter().for_each(|linear| observer.linear_input(linear.tensor(), x));
                let mut products = [
                    Product::new(q, x, &mut w.q),
                    Product::new(k, x, &mut w.k),
                    Product::new(v, x, &mut w.v),
                ];
                multiply_all(checkpoint, &mut products)?;
            }
            Projections::Fused(linear) => {
                observer.linear_input(linear.tensor(), x);
                multiply_all(checkpoint, &mut [Product::new(linear, x, &mut w.fused)])?;
                w.split(config);
            }
        }
        self.mix(checkpoint, config, qkv_bits, layer, rotations, cache, w)?;
        observer.linear_input(self.output.tensor(), &w.heads);
        multiply_all(checkpoint, &mut [Product::new(&self.output, &w.heads, out)])
    }

    /// The same for one token of each of several sequences, each as it is by itself.
    pub(crate) fn forward_side_by_side(
        &self,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        qkv_bits: Option<u8>,
        layer: usize,
        streams: &mut [Stream<'_>],
    ) -> Result<()> {
        match &self.projections {
            Projections::Separate(linears) => {
                let [q, k, v] = &**linears;
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.attention.q)).collect();
                multiply_side_by_side(checkpoint, q, pairs)?;
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.attention.k)).collect();
                multiply_side_by_side(checkpoint, k, pairs)?;
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.attention.v)).collect();
                multiply_side_by_side(checkpoint, v, pairs)?;
            }
            Projections::Fused(linear) => {
                let pairs = streams.iter_mut().map(|s| (&s.x, &mut s.attention.fused)).collect();
                multiply_side_by_side(checkpoint, linear, pairs)?;
                streams.iter_mut().for_each(|s| s.attention.split(config));
            }
        }
        for s in &mut *streams {
            self.mix(checkpoint, config, qkv_bits, layer, &s.rotations, s.cache, &mut s.attention)?;
        }
        let pairs = streams.iter_mut().map(|s| (&s.attention.heads, &mut s.y)).collect();
        multiply_side_by_side(checkpoint, &self.output, pairs)
    }

    /// From queries, keys and values to what the heads see: of tokens that follow those in the cache.
    #[expect(clippy::too_many_arguments, reason = "what a layer's attention depends on")]
    fn mix(
        &self,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        qkv_bits: Option<u8>,
        layer: usize,
        rotations: &[Rotation],
        cache: &mut Cache,
        w: &mut Workspace,
    ) -> Result<()> {
        let d = config.head_dim;
        let eps = config.norm_eps;
        let (q_norm, k_norm) = match &self.qk_norm {
            HeadNorms::None => (None, None),
            HeadNorms::Heads(q, k) => (Some(q.as_slice()), Some(k.as_slice())),
            HeadNorms::Whole(q, k) => {
                for (norm, x) in [(q, &mut w.q), (k, &mut w.k)] {
                    norm.apply(x, eps, &mut w.heads);
                    std::mem::swap(x, &mut w.heads);
                }
                (None, None)
            }
        };
        let rotation = &rotations[self.rope];
        prepare_heads(&mut w.q, d, q_norm, eps, rotation, config.attention_scale);
        prepare_heads(&mut w.k, d, k_norm, eps, rotation, 1.0);
        let odd = |name: &str, bits: u8| {
            Error::Invalid(format!(
                "{}: {name} of layer {layer} is NaN or infinite, which {bits} bits cannot hold",
                checkpoint.root().display()
            ))
        };
        let held = cache.codes();
        if let Some(bits) = qkv_bits {
            let all = [("query", &mut w.q), ("key", &mut w.k), ("value", &mut w.v)];
            // A cache of codes rounds keys and values once, as it holds them.
            for (name, x) in all.into_iter().take(if held.is_some() { 1 } else { 3 }) {
                if !quantize_heads(x, d, bits) {
                    return Err(odd(name, bits));
                }
            }
        }
        let first = cache.len();
        let past =
            cache.append(layer, &w.k, &w.v, d).map_err(|name| odd(name, held.map_or(0, HeadCodes::bits)))?;
        w.heads.resize(config.heads * d, w.q.tokens());
        self.attend(config, past, first, &w.q, &mut w.heads);
        Ok(())
    }

    /// Every head of every panel: tokens `first ..` against the cache and themselves.
    fn attend(&self, config: &ModelConfig, past: &LayerCache, first: usize, q: &Panels, out: &mut Panels) {
        let d = config.head_dim;
        let group = config.heads / config.kv_heads;
        let widths: Vec<usize> = (0..q.count()).map(|panel| q.width(panel)).collect();
        let tasks: Vec<_> = out
            .panels_mut()
            .enumerate()
            .flat_map(|(panel, data)| {
                data.chunks_exact_mut(d * widths[panel]).enumerate().map(move |h| (panel, h))
            })
            .collect();
        let one = |(panel, (head, out)): (usize, (usize, &mut [f32]))| {
            let width = widths[panel];
            let query = &q.panel(panel)[head * d * width..][..d * width];
            let start = first + q.range(panel).start;
            SCORES.with_borrow_mut(|scores| {
                self.attend_head(
                    past,
                    head / group,
                    start,
                    width,
                    query,
                    config.attention_softcap,
                    scores,
                    out,
                );
            });
        };
        // A single token over a short past is done before another thread is awake.
        if q.tokens() == 1 && first * config.heads * d < 1 << 18 {
            tasks.into_iter().for_each(one);
        } else {
            tasks.into_par_iter().with_max_len(1).for_each(one);
        }
    }

    /// One head of one panel, whose first token is at position `start`.
    #[expect(clippy::too_many_arguments, reason = "the operands of one product of products")]
    fn attend_head(
        &self,
        past: &LayerCache,
        kv_head: usize,
        start: usize,
        width: usize,
        query: &[f32],
        cap: Option<f32>,
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let end = start + width;
        let window = self.window.unwrap_or(usize::MAX);
        let oldest = (start + 1).saturating_sub(window);
        scores.resize((end - oldest) * width, 0.0);
        past.scores(kv_head, oldest, query, width, scores);
        if let Some(cap) = cap {
            scores.iter_mut().for_each(|score| *score = soft_cap(*score, cap));
        }
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let seen = oldest + row;
            // Tokens see themselves and what is before them, within the window.
            if seen > start || end - 1 - seen >= window {
                for (token, score) in scores.iter_mut().enumerate() {
                    let position = start + token;
                    if seen > position || position - seen >= window {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
        softmax(scores, width);
        past.outputs(kv_head, oldest, scores, width, out);
    }
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Norms, turns and scales each head.
fn prepare_heads(
    x: &mut Panels,
    head_dim: usize,
    norm: Option<&[f32]>,
    eps: f32,
    rotation: &Rotation,
    scale: f32,
) {
    let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
    let prepare = |(panel, data): (usize, &mut [f32])| {
        let width = widths[panel];
        for head in data.chunks_exact_mut(head_dim * width) {
            if let Some(weight) = norm {
                let unnormed = head.to_vec();
                rms_norm(&unnormed, weight, eps, width, head);
            }
            rotation.turn(panel, width, head);
            if scale != 1.0 {
                head.iter_mut().for_each(|q| *q *= scale);
            }
        }
    };
    let panels: Vec<_> = x.panels_mut().enumerate().collect();
    if panels.len() == 1 {
        panels.into_iter().for_each(prepare);
    } else {
        panels.into_par_iter().for_each(prepare);
    }
}

/// `to = features from .. from + count of x`.
pub(crate) fn copy_features(x: &Panels, from: usize, count: usize, to: &mut Panels) {
    to.resize(count, x.tokens());
    for panel in 0..x.count() {
        let width = x.width(panel);
        to.panel_mut(panel).copy_from_slice(&x.panel(panel)[from * width..(from + count) * width]);
    }
}
