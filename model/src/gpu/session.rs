//! One sequence on a GPU: its cache, its activations, and a recorded step.

mod experts;

use std::cell::Cell;
use std::ops::Range;

use llmpress_formats::{Error, Result};
use llmpress_kernels::gpu::abq::{self, integer};
use llmpress_kernels::gpu::attention::{Attend, Cache, Heads, attend, workspace_bytes};
use llmpress_kernels::gpu::dense::{Element, row_stride};
use llmpress_kernels::gpu::embedding::{Gather, embed, embed_fixed12};
use llmpress_kernels::gpu::experts::Routing;
use llmpress_kernels::gpu::gate::{Activation as Gate, gate};
use llmpress_kernels::gpu::product::{Product, Weights, Workspace, product, split_bytes};
use llmpress_kernels::gpu::rms_norm::{add_rms_norm, rms_norm};
use llmpress_kernels::gpu::rope::{HeadNorms, Rotation, rope};
use llmpress_kernels::gpu::sampling::{DRAW_WORKSPACE_BYTES, Draw, advance, argmax, draw, soft_cap};
use llmpress_kernels::gpu::{self, Buffer, Graph, View};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::weights::{GpuLinear, Source};
use super::{GpuAttention, GpuLayer, GpuMlp, GpuMlpBody, GpuModel, device};
use crate::config::Activation;
use crate::rope::cos_sin;
use crate::{ModelConfig, Panels, Sampling, Session, Skips, SubLayer};
use experts::PlanBuffers;
pub(super) use experts::plan_bytes;

/// Most tokens that are read at a time.
const CHUNK_TOKENS: usize = 2048;
/// Bytes for the tiles of attention of some tokens at a time, besides those of one token.
pub(super) const WORKSPACE_BYTES: usize = 16 << 20;
/// Positions whose angles are made at a time.
const ANGLES: usize = 1024;

/// A row of the input of a product: whole tiles.
pub(super) fn padded(features: usize) -> usize {
    features.next_multiple_of(64)
}

/// Tokens that a sequence of so many is read by.
pub(super) fn chunk(capacity: usize) -> usize {
    CHUNK_TOKENS.min(capacity.max(1))
}

/// The heads of a model.
pub(super) fn heads(c: &ModelConfig) -> Heads {
    Heads { heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim }
}

/// The function of a gate.
fn activation(function: Activation) -> Gate {
    match function {
        Activation::Silu => Gate::Silu,
        Activation::GeluTanh => Gate::GeluTanh,
    }
}

/// Elements of the activations of `tokens` tokens: inputs and outputs of the products of an MLP with so many features inside.
pub(super) fn mlp_elements(
    hidden: usize,
    inner: usize,
    routing: Option<Routing>,
    tokens: usize,
) -> (usize, usize) {
    let rows = routing.map_or(tokens, |routing| routing.slots(tokens));
    let logits = routing.map_or(0, |routing| tokens * routing.experts);
    (rows * padded(inner), (rows * hidden.max(2 * inner)).max(logits))
}

/// Angles of one rotary embedding on the device.
#[derive(Debug)]
struct Angles {
    half: usize,
    cos: Buffer,
    sin: Buffer,
    frequencies: Vec<f32>,
    /// Positions for which they are made.
    made: Range<usize>,
}

/// Activations and the cache of a sequence.
#[derive(Debug)]
pub(super) struct GpuSession<'a> {
    model: &'a GpuModel,
    capacity: usize,
    length: usize,
    announced: usize,
    chunk: usize,
    /// Keys and values of each layer.
    cache: Vec<(Buffer, Buffer)>,
    angles: Vec<Angles>,
    position: Buffer,
    ids: Buffer,
    /// The residual stream, F32.
    h: Buffer,
    /// Inputs of products, BF16.
    x: Buffer,
    /// Outputs of products, F32.
    y: Buffer,
    workspace: Buffer,
    products: Workspace,
    plan: PlanBuffers,
    /// A decoded unit, and which.
    scratch: Buffer,
    held: Cell<Option<usize>>,
    /// States of kept tokens, BF16, and how many.
    kept: Buffer,
    kept_tokens: usize,
    /// State, logits and likeliest successor of a single token.
    state: Buffer,
    logits: Buffer,
    next: Buffer,
    /// A random number, what a draw works in, and what it draws.
    random: Buffer,
    drawing: Buffer,
    drawn: Buffer,
    /// The label of the first matrix whose activations could not be quantised; 0: of none.
    fault: Buffer,
    /// Whether those are of the last kept token.
    picked: bool,
    steps: usize,
    graph: Option<Box<dyn Graph>>,
}

impl<'a> GpuSession<'a> {
    pub(super) fn new(model: &'a GpuModel, capacity: usize) -> Result<Self> {
        let c = &model.config;
        let heads = model.heads();
        heads.check().map_err(device)?;
        let capacity = capacity.max(1);
        let chunk = chunk(capacity);
        // A token is spread over the whole GPU; more of them are where there is room.
        let workspace = workspace_bytes(heads, chunk, capacity).min(WORKSPACE_BYTES);
        let workspace = workspace.max(workspace_bytes(heads, 1, capacity));
        let allocate = |bytes: usize| model.gpu.allocate(bytes).map_err(device);
        let cache_bytes = Cache::bytes(heads, capacity);
        let qkv = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
        let (mut inputs, mut outputs) =
            (chunk * padded(c.hidden_size.max(heads.heads * heads.head_dim)), chunk * qkv.max(c.hidden_size));
        for mlp in model.layers.iter().filter_map(|layer| layer.mlp.as_ref()) {
            let (inner, routing) = match &mlp.body {
                GpuMlpBody::Dense { down, .. } => (down.cols, None),
                GpuMlpBody::Experts(experts) => (experts.down.cols, Some(experts.routing)),
            };
            let (input, output) = mlp_elements(c.hidden_size, inner, routing, chunk);
            (inputs, outputs) = (inputs.max(input), outputs.max(output));
        }
        // The head's products are of few tokens, or of few rows at a time: not worth room for a decoded vocabulary.
        let products = model.layers.iter().flat_map(GpuLayer::linears).map(|linear| match &linear.source {
            Source::Fixed12(matrix) => {
                let weights = Weights::Fixed12 { matrix, first: 0, rows: linear.rows, whole: linear.whole };
                weights.workspace_bytes(&model.gpu, chunk)
            }
            Source::Abq(matrix) => {
                let weights = abq::Weights { matrix, first: 0, rows: linear.rows, whole: linear.whole };
                abq::workspace_bytes(&model.gpu, weights, chunk)
            }
            Source::Integers { matrix, .. } => {
                integer::workspace_bytes(&model.gpu, integer::Weights::all(matrix), chunk)
            }
            _ => split_bytes(linear.rows, linear.whole, chunk),
        });
        let of_head = match &model.head().source {
            // As many tokens as are kept.
            Source::Integers { matrix, .. } => {
                integer::workspace_bytes(&model.gpu, integer::Weights::all(matrix), capacity)
            }
            _ => split_bytes(model.head().rows, model.head().rows, chunk),
        };
        let products = products.max().unwrap_or(0).max(of_head);
        // A layer without attention has no keys and values.
        let cache = model.layers.iter().map(|layer| {
            let bytes = if layer.attention.is_some() { cache_bytes } else { 0 };
            Ok((allocate(bytes)?, allocate(bytes)?))
        });
        let angles = c.ropes.iter().map(|rope| {
            let half = rope.frequencies(1).0.len();
            let bytes = 4 * capacity * half;
            let (cos, sin) = (allocate(bytes)?, allocate(bytes)?);
            Ok(Angles { half, cos, sin, frequencies: Vec::new(), made: 0..0 })
        });
        Ok(Self {
            capacity,
            length: 0,
            announced: 0,
            chunk,
            cache: cache.collect::<Result<_>>()?,
            angles: angles.collect::<Result<_>>()?,
            position: model.gpu.upload(&[0u32]).map_err(device)?,
            ids: allocate(4 * chunk)?,
            h: allocate(4 * chunk * c.hidden_size)?,
            x: allocate(2 * inputs)?,
            y: allocate(4 * outputs)?,
            workspace: allocate(workspace)?,
            products: Workspace::new(&model.gpu, products).map_err(device)?,
            plan: PlanBuffers::new(model, chunk)?,
            scratch: allocate(2 * model.scratch_elements())?,
            held: Cell::new(None),
            kept: allocate(0)?,
            kept_tokens: 0,
            state: allocate(2 * padded(c.hidden_size))?,
            logits: allocate(4 * model.head().rows)?,
            next: allocate(4)?,
            random: allocate(8)?,
            drawing: allocate(DRAW_WORKSPACE_BYTES)?,
            drawn: allocate(4)?,
            fault: model.gpu.upload(&[0u32]).map_err(device)?,
            picked: false,
            steps: 0,
            graph: None,
            model,
        })
    }

    /// Makes the angles of positions `self.length .. end`.
    fn make_angles(&mut self, end: usize) -> Result<()> {
        let total = self.announced.max(end);
        for (rope, angles) in self.model.config.ropes.iter().zip(&mut self.angles) {
            let (frequencies, scale) = rope.frequencies(total);
            if frequencies != angles.frequencies {
                angles.frequencies = frequencies;
                angles.made = self.length..self.length;
            }
            if angles.made.start <= self.length && angles.made.end >= end {
                continue;
            }
            let first = if angles.made.contains(&self.length) { angles.made.end } else { self.length };
            let last = end.max(first + ANGLES).min(self.capacity);
            let (mut cos, mut sin) = (Vec::new(), Vec::new());
            for position in first..last {
                for frequency in &angles.frequencies {
                    let (c, s) = cos_sin(position, *frequency, scale);
                    cos.push(c);
                    sin.push(s);
                }
            }
            let bytes = 4 * first * angles.half..4 * last * angles.half;
            angles.cos.slice(bytes.clone()).and_then(|view| view.write(&cos)).map_err(device)?;
            angles.sin.slice(bytes).and_then(|view| view.write(&sin)).map_err(device)?;
            angles.made = first.min(self.length)..last;
        }
        Ok(())
    }

    /// Runs `tokens` tokens, whose ids are on the device, through the layers: `h` is the residual stream after them.
    /// Attention has room for `length` positions.
    fn run(&self, tokens: usize, length: usize, skips: &Skips) -> gpu::Result<()> {
        let m = self.model;
        let (hidden, eps) = (m.config.hidden_size, m.config.rms_norm_eps);
        let scale = m.config.embedding_scale();
        let gather = Gather { ids: self.ids.view(), tokens, scale, h: self.h.view() };
        match &m.embedding.source {
            Source::Dense { words, element } => {
                embed(&m.gpu, words.view(), *element, m.embedding.rows, hidden, &gather)?;
            }
            Source::Fixed12(matrix) => embed_fixed12(&m.gpu, matrix, &gather)?,
            Source::Dfloat11 { unit, first } => {
                let words = self.unit(*unit, *first, m.embedding.rows * hidden)?;
                embed(&m.gpu, words, Element::Bf16, m.embedding.rows, hidden, &gather)?;
            }
            Source::Abq(_) | Source::Integers { .. } => {
                return Err(gpu::Error::Unsupported("rows of an abq matrix are not gathered".to_owned()));
            }
        }
        let norm = |weight| {
            rms_norm(&m.gpu, self.h.view(), weight, hidden, tokens, eps, self.x.view(), padded(hidden))
        };
        for (index, layer) in m.layers.iter().enumerate() {
            let attention = layer.attention.as_ref();
            if let Some(a) = attention.filter(|_| !skips.contains(&SubLayer::Attention(index))) {
                norm(a.norm.view())?;
                self.attention(index, a, tokens, length)?;
            }
            if let Some(mlp) = layer.mlp.as_ref().filter(|_| !skips.contains(&SubLayer::Mlp(index))) {
                norm(mlp.norm.view())?;
                self.mlp(mlp, tokens)?;
            }
        }
        advance(&m.gpu, self.position.view(), tokens)
    }

    fn attention(&self, index: usize, a: &GpuAttention, tokens: usize, length: usize) -> gpu::Result<()> {
        let m = self.model;
        let heads = m.heads();
        let width = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
        let mut at = 0;
        for linear in &a.projections {
            let y = self.y.slice(4 * at..self.y.bytes())?;
            self.product(linear, tokens, y, width, false)?;
            at += linear.rows;
        }
        let angles = &self.angles[a.rope];
        let rotation = Rotation { cos: angles.cos.view(), sin: angles.sin.view(), half: angles.half };
        let norms = a.qk_norm.as_ref().map(|(query, key)| HeadNorms {
            query: query.view(),
            key: key.view(),
            eps: m.config.rms_norm_eps,
        });
        let (keys, values) = &self.cache[index];
        let cache = Cache { keys: keys.view(), values: values.view(), capacity: self.capacity };
        let position = self.position.view();
        rope(&m.gpu, heads, self.y.view(), tokens, rotation, norms, position, cache)?;
        attend(
            &m.gpu,
            &Attend {
                heads,
                queries: self.y.view(),
                stride: width,
                tokens,
                position,
                length,
                window: a.window,
                scale: m.config.attention_scale,
                cache,
                workspace: self.workspace.view(),
                x: self.x.view(),
                ld: padded(heads.heads * heads.head_dim),
            },
        )?;
        self.add_output(&a.output, a.post_norm.as_ref(), tokens)
    }

    fn mlp(&self, mlp: &GpuMlp, tokens: usize) -> gpu::Result<()> {
        let (gate_up, down) = match &mlp.body {
            GpuMlpBody::Dense { gate_up, down } => (gate_up, down),
            GpuMlpBody::Experts(experts) => return self.experts(experts, mlp.activation, tokens),
        };
        let inner = down.cols;
        let mut at = 0;
        for linear in gate_up {
            let y = self.y.slice(4 * at..self.y.bytes())?;
            self.product(linear, tokens, y, 2 * inner, false)?;
            at += linear.rows;
        }
        let up = self.y.slice(4 * inner..self.y.bytes())?;
        let (gpu, function) = (&self.model.gpu, activation(mlp.activation));
        gate(gpu, function, self.y.view(), up, inner, 2 * inner, tokens, self.x.view(), padded(inner))?;
        self.add_output(down, mlp.post_norm.as_ref(), tokens)
    }

    /// `h += W x`, or the norm of `W x`.
    fn add_output(&self, linear: &GpuLinear, post_norm: Option<&Buffer>, tokens: usize) -> gpu::Result<()> {
        let m = self.model;
        let hidden = m.config.hidden_size;
        match post_norm {
            None => self.product(linear, tokens, self.h.view(), hidden, true),
            Some(weight) => {
                self.product(linear, tokens, self.y.view(), hidden, false)?;
                let eps = m.config.rms_norm_eps;
                add_rms_norm(&m.gpu, self.y.view(), weight.view(), hidden, tokens, eps, self.h.view())
            }
        }
    }

    /// A product with what is in `x`.
    fn product(
        &self,
        linear: &GpuLinear,
        tokens: usize,
        y: View<'_>,
        y_stride: usize,
        adds: bool,
    ) -> gpu::Result<()> {
        self.product_of(linear, 0..linear.rows, self.x.view(), tokens, y, y_stride, adds)
    }

    #[expect(clippy::too_many_arguments, reason = "the operands of a product")]
    fn product_of(
        &self,
        linear: &GpuLinear,
        rows: Range<usize>,
        x: View<'_>,
        tokens: usize,
        y: View<'_>,
        y_stride: usize,
        adds: bool,
    ) -> gpu::Result<()> {
        let (cols, count) = (linear.cols, rows.len());
        let bias = match &linear.bias {
            Some(bias) => Some(bias.slice(4 * rows.start..4 * rows.end)?),
            None => None,
        };
        let workspace = Some(&self.products);
        let operands = Product { x, stride: padded(cols), tokens, y, y_stride, bias, adds, workspace };
        let (gpu, picker) = (&self.model.gpu, &self.model.picker);
        let dense = |words, element, fresh| Weights::Dense {
            words,
            element,
            rows: count,
            cols,
            whole: linear.whole,
            fresh,
        };
        let weights = match &linear.source {
            Source::Dense { words, element } => {
                let row = element.bytes() * row_stride(cols);
                dense(words.slice(row * rows.start..row * rows.end)?, *element, false)
            }
            Source::Fixed12(matrix) => {
                Weights::Fixed12 { matrix, first: rows.start, rows: count, whole: linear.whole }
            }
            Source::Dfloat11 { unit, first } => {
                dense(self.unit(*unit, first + rows.start * cols, count * cols)?, Element::Bf16, true)
            }
            Source::Abq(matrix) => {
                let weights = abq::Weights { matrix, first: rows.start, rows: count, whole: linear.whole };
                return abq::product(gpu, weights, &operands, picker);
            }
            Source::Integers { matrix, label } => {
                let weights = integer::Weights { matrix, first: rows.start, rows: count };
                let quantising =
                    integer::Quantising { wide: false, fault: Some((self.fault.view(), *label)) };
                return integer::product(gpu, weights, &operands, &quantising, picker);
            }
        };
        product(gpu, weights, &operands, picker)
    }

    /// Some words of a unit, which is decoded unless it was the last one: but for what belongs to experts.
    fn unit(&self, unit: usize, first: usize, count: usize) -> gpu::Result<View<'_>> {
        if self.held.get() != Some(unit) {
            self.model.units[unit].decode_common(&self.model.gpu, self.scratch.view())?;
            self.held.set(Some(unit));
        }
        self.scratch.slice(2 * first..2 * (first + count))
    }

    /// Refuses what was computed from activations that could not be quantised.
    fn check_quantised(&self) -> Result<()> {
        let names = &self.model.quantised;
        if names.is_empty() {
            return Ok(());
        }
        let label = self.fault.view().read::<u32>(1).map_err(device)?[0] as usize;
        match label.checked_sub(1).and_then(|at| names.get(at)) {
            None => Ok(()),
            Some(name) => {
                self.fault.view().write(&[0u32]).map_err(device)?;
                Err(Error::Invalid(format!(
                    "an activation that {name} multiplies is NaN or infinite, or too large to quantise"
                )))
            }
        }
    }

    /// The last norm of some rows of `h`.
    fn last_norm(&self, tokens: Range<usize>, to: View<'_>) -> gpu::Result<()> {
        let m = self.model;
        let hidden = m.config.hidden_size;
        let h = self.h.slice(4 * tokens.start * hidden..4 * tokens.end * hidden)?;
        let eps = m.config.rms_norm_eps;
        rms_norm(&m.gpu, h, m.norm.view(), hidden, tokens.len(), eps, to, padded(hidden))
    }

    /// Logits and likeliest successor of what is in `state`.
    fn succeed(&self) -> gpu::Result<()> {
        let m = self.model;
        let vocab = m.head().rows;
        self.product_of(m.head(), 0..vocab, self.state.view(), 1, self.logits.view(), vocab, false)?;
        if let Some(cap) = m.config.final_softcap {
            soft_cap(&m.gpu, self.logits.view(), vocab, cap)?;
        }
        argmax(&m.gpu, self.logits.view(), vocab, self.next.view())
    }

    /// One token, whose id is on the device.
    fn step(&self) -> gpu::Result<()> {
        // What a recording decodes does not depend on what was decoded before it.
        self.held.set(None);
        self.run(1, self.capacity, &Skips::new())?;
        self.last_norm(0..1, self.state.view())?;
        self.succeed()
    }

    /// A step by the recording; the first one runs as it is, so that kernels are loaded and shapes are picked.
    fn single(&mut self) -> gpu::Result<()> {
        if self.graph.is_none() && self.steps > 0 {
            self.graph = Some(self.model.gpu.capture(|| self.step())?);
        }
        match &mut self.graph {
            Some(graph) => {
                graph.replay()?;
                self.held.set(None);
            }
            None => self.step()?,
        }
        self.steps += 1;
        Ok(())
    }
}

impl Session for GpuSession<'_> {
    fn len(&self) -> usize {
        self.length
    }

    fn clear(&mut self) {
        (self.length, self.announced) = (0, 0);
    }

    fn announce(&mut self, length: usize) {
        self.announced = length;
    }

    fn read(&mut self, ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()> {
        let needed = self.length.saturating_add(ids.len());
        if needed > self.capacity {
            return Err(Error::Limit(format!("{needed} tokens do not fit a cache of {}", self.capacity)));
        }
        let vocab = self.model.embedding.rows;
        if let Some((token, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
            return Err(Error::Invalid(format!(
                "token id {id} at {token} is beyond the vocabulary of {vocab} of {}",
                self.model.checkpoint.root().display()
            )));
        }
        self.make_angles(needed)?;
        self.position.view().write(&[self.length as u32]).map_err(device)?;
        if ids.len() == 1 && keep == (0..1) && skips.is_empty() {
            self.ids.view().write(ids).map_err(device)?;
            self.single().map_err(device)?;
            (self.picked, self.kept_tokens) = (true, 0);
            self.length = needed;
            return Ok(());
        }
        let row = 2 * padded(self.model.config.hidden_size);
        if self.kept.bytes() < keep.len() * row {
            self.kept = self.model.gpu.allocate(keep.len() * row).map_err(device)?;
        }
        (self.picked, self.kept_tokens) = (false, keep.len());
        let mut first = 0;
        for piece in ids.chunks(self.chunk) {
            self.ids.view().write(piece).map_err(device)?;
            let end = first + piece.len();
            self.run(piece.len(), self.length + piece.len(), skips).map_err(device)?;
            let kept = keep.start.clamp(first, end)..keep.end.clamp(first, end);
            if !kept.is_empty() {
                let to = (kept.start - keep.start) * row..(kept.end - keep.start) * row;
                let to = self.kept.slice(to).map_err(device)?;
                self.last_norm(kept.start - first..kept.end - first, to).map_err(device)?;
            }
            self.length += piece.len();
            first = end;
        }
        Ok(())
    }

    /// In the pieces of this device: the more tokens at once, the less often weights are read.
    fn prefill(&mut self, ids: &[u32]) -> Result<()> {
        let last =
            ids.len().checked_sub(1).ok_or_else(|| Error::Invalid("the prompt has no tokens".to_owned()))?;
        self.announce(self.length.saturating_add(ids.len()));
        self.read(ids, &Skips::new(), last..last + 1)
    }

    fn logits(&mut self, run: Range<usize>, out: &mut Panels) -> Result<()> {
        let tokens = if self.picked { 1 } else { self.kept_tokens };
        out.resize(run.len(), tokens);
        if tokens == 0 || run.is_empty() {
            return Ok(());
        }
        let m = self.model;
        let count = tokens * run.len();
        let logits = m.gpu.allocate(4 * count).map_err(device)?;
        let x = if self.picked { self.state.view() } else { self.kept.view() };
        self.product_of(m.head(), run.clone(), x, tokens, logits.view(), run.len(), false).map_err(device)?;
        if let Some(cap) = m.config.final_softcap {
            soft_cap(&m.gpu, logits.view(), count, cap).map_err(device)?;
        }
        let values: Vec<f32> = logits.view().read(count).map_err(device)?;
        self.check_quantised()?;
        for (token, values) in values.chunks_exact(run.len()).enumerate() {
            out.set_token(token, values.iter().copied());
        }
        Ok(())
    }

    fn pick(&mut self, sampling: Sampling, random: &mut ChaCha8Rng) -> Result<u32> {
        if !self.picked {
            let row = 2 * padded(self.model.config.hidden_size);
            let last = self
                .kept_tokens
                .checked_sub(1)
                .ok_or_else(|| Error::Invalid("no token was kept to go on from".to_owned()))?;
            self.kept
                .slice(last * row..(last + 1) * row)
                .and_then(|state| state.copy_to(self.state.view()))
                .and_then(|()| self.succeed())
                .map_err(device)?;
            self.picked = true;
        }
        self.check_quantised()?;
        if sampling.temperature == 0.0 {
            return Ok(self.next.view().read::<u32>(1).map_err(device)?[0]);
        }
        self.random.view().write(&[random.next_u64()]).map_err(device)?;
        let operands = Draw {
            logits: self.logits.view(),
            vocab: self.model.head().rows,
            limits: sampling.limits(),
            random: self.random.view(),
            workspace: self.drawing.view(),
            ids: self.drawn.view(),
        };
        draw(&self.model.gpu, &operands).map_err(device)?;
        Ok(self.drawn.view().read::<u32>(1).map_err(device)?[0])
    }
}

impl GpuModel {
    fn heads(&self) -> Heads {
        heads(&self.config)
    }
}
