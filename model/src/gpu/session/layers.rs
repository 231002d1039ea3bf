//! A step through the layers.

use std::ops::Range;

use llmpress_formats::{Error, Result};
use llmpress_kernels::gpu::abq::{self, integer};
use llmpress_kernels::gpu::attention::{Attend, Cache, Sequences, attend};
use llmpress_kernels::gpu::block_sums::block_sums;
use llmpress_kernels::gpu::cache_codes::Codes;
use llmpress_kernels::gpu::dense::{Element, row_stride};
use llmpress_kernels::gpu::embedding::{Gather, add_positions, embed, embed_fixed12};
use llmpress_kernels::gpu::gate::gate;
use llmpress_kernels::gpu::product::{Product, Weights, product};
use llmpress_kernels::gpu::rms_norm::{add_rms_norm, rms_norm_rows};
use llmpress_kernels::gpu::rope::{HeadNorms, Rotation, rope};
use llmpress_kernels::gpu::sampling::{advance, argmax, soft_cap};
use llmpress_kernels::gpu::{self, Buffer, View};

use super::super::norms::GpuNorm;
use super::super::weights::{GpuLinear, Source};
use super::super::{GpuAttention, GpuMlp, GpuMlpBody, QkNorm, device};
use super::{GpuSession, activation, padded};
use crate::{Skips, SubLayer};

impl GpuSession<'_> {
    /// Runs the tokens of sequences, whose ids are on the device, through the layers: `h` is the residual stream after them.
    /// Attention has room for `length` positions.
    pub(super) fn run(&self, count: usize, each: usize, length: usize, skips: &Skips) -> gpu::Result<()> {
        let m = self.model;
        let tokens = count * each;
        let sequences =
            Sequences { count, each, positions: self.positions.view(), places: self.places.view() };
        let (hidden, eps) = (m.config.hidden_size, m.stream.eps);
        let scale = m.stream.embedding_scale;
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
            Source::Abq(_) | Source::Integers { .. } | Source::Sparse24(_) | Source::WithSums { .. } => {
                return Err(gpu::Error::Unsupported(
                    "rows of a matrix of abq, sparse24 or lowrank are not gathered".to_owned(),
                ));
            }
        }
        if let Some((table, rows)) = &m.positions {
            add_positions(&m.gpu, table.view(), *rows, hidden, sequences, self.h.view())?;
        }
        let norm =
            |norm: &GpuNorm, x| norm.apply(&m.gpu, self.h.view(), hidden, tokens, eps, x, padded(hidden));
        // Side by side both sub-layers read the stream before either has added to it.
        let parallel = m.config.blueprint.parallel;
        let of_mlp = if parallel { self.beside.view() } else { self.x.view() };
        for (index, layer) in m.layers.iter().enumerate() {
            let attention = layer.attention.as_ref();
            let mlp = layer.mlp.as_ref().filter(|_| !skips.contains(&SubLayer::Mlp(index)));
            if let Some(mlp) = mlp.filter(|_| parallel) {
                norm(&mlp.norm, of_mlp)?;
            }
            if let Some(a) = attention.filter(|_| !skips.contains(&SubLayer::Attention(index))) {
                norm(&a.norm, self.x.view())?;
                self.attention(index, a, sequences, length)?;
            }
            if let Some(mlp) = mlp {
                if !parallel {
                    norm(&mlp.norm, of_mlp)?;
                }
                self.mlp(mlp, of_mlp, tokens)?;
            }
        }
        advance(&m.gpu, self.positions.view(), count, each)
    }

    fn attention(
        &self,
        index: usize,
        a: &GpuAttention,
        sequences: Sequences<'_>,
        length: usize,
    ) -> gpu::Result<()> {
        let m = self.model;
        let tokens = sequences.tokens();
        let heads = m.heads();
        let width = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
        let mut at = 0;
        for linear in &a.projections {
            let y = self.y.slice(4 * at..self.y.bytes())?;
            self.product(linear, tokens, y, width, false)?;
            at += linear.rows;
        }
        let angles = &self.angles[a.rope];
        let rotation = Rotation {
            cos: angles.cos.view(),
            sin: angles.sin.view(),
            half: angles.half,
            neighbours: m.config.ropes[a.rope].turns_neighbours(),
        };
        let eps = m.config.norm_eps;
        let norms = match &a.qk_norm {
            QkNorm::None => None,
            QkNorm::Heads(query, key) => Some(HeadNorms { query: query.view(), key: key.view(), eps }),
            QkNorm::Whole(query, key) => {
                let (queries, keys) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
                rms_norm_rows(&m.gpu, self.y.view(), width, query.view(), queries, tokens, eps)?;
                let of_keys = self.y.slice(4 * queries..self.y.bytes())?;
                rms_norm_rows(&m.gpu, of_keys, width, key.view(), keys, tokens, eps)?;
                None
            }
        };
        let (keys, values) = &self.cache[index];
        let cache = Cache {
            keys: keys.view(),
            values: values.view(),
            codes: m.cache_bits.map(|bits| Codes { bits, fault: Some((self.fault.view(), a.label)) }),
            capacity: self.capacity,
            sequences: self.lengths.len(),
        };
        rope(&m.gpu, heads, self.y.view(), sequences, rotation, norms, cache)?;
        attend(
            &m.gpu,
            &Attend {
                heads,
                queries: self.y.view(),
                stride: width,
                sequences,
                length,
                window: a.window,
                scale: m.config.attention_scale,
                cap: m.config.attention_softcap,
                cache,
                workspace: self.workspace.view(),
                x: self.x.view(),
                ld: padded(heads.heads * heads.head_dim),
            },
        )?;
        self.add_output(&a.output, a.post_norm.as_ref(), tokens)
    }

    /// `h += mlp(x)`.
    fn mlp(&self, mlp: &GpuMlp, x: View<'_>, tokens: usize) -> gpu::Result<()> {
        let (gate_up, down, gated) = match &mlp.body {
            GpuMlpBody::Dense { gate_up, down, gated } => (gate_up, down, *gated),
            GpuMlpBody::Experts(experts) => return self.experts(experts, mlp.activation, tokens),
        };
        let inner = down.cols;
        let stride = if gated { 2 * inner } else { inner };
        let mut at = 0;
        for linear in gate_up {
            let y = self.y.slice(4 * at..self.y.bytes())?;
            self.product_of(linear, 0..linear.rows, x, tokens, y, stride, false)?;
            at += linear.rows;
        }
        let up = if gated { Some(self.y.slice(4 * inner..self.y.bytes())?) } else { None };
        let (gpu, function) = (&self.model.gpu, activation(mlp.activation));
        gate(gpu, function, self.y.view(), up, inner, stride, tokens, self.x.view(), padded(inner))?;
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
                let eps = m.config.norm_eps;
                add_rms_norm(&m.gpu, self.y.view(), weight.view(), hidden, tokens, eps, self.h.view())
            }
        }
    }

    /// A product with what is in `x`.
    pub(super) fn product(
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
    pub(super) fn product_of(
        &self,
        linear: &GpuLinear,
        rows: Range<usize>,
        x: View<'_>,
        tokens: usize,
        y: View<'_>,
        y_stride: usize,
        adds: bool,
    ) -> gpu::Result<()> {
        let bias = match &linear.bias {
            Some(bias) => Some(bias.slice(4 * rows.start..4 * rows.end)?),
            None => None,
        };
        let (stride, workspace) = (padded(linear.cols), Some(&self.products));
        self.product_with(linear, rows, Product { x, stride, tokens, y, y_stride, bias, adds, workspace })
    }

    /// The product of some rows with given operands.
    fn product_with(&self, linear: &GpuLinear, rows: Range<usize>, operands: Product<'_>) -> gpu::Result<()> {
        let (cols, count) = (linear.cols, rows.len());
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
            Source::WithSums { base, sums, block } => {
                self.product_with(base, rows.clone(), operands)?;
                let (blocks, of_blocks) = (padded(sums.cols), self.sums.view());
                let Product { x, stride, tokens, .. } = operands;
                block_sums(gpu, x, stride, tokens, cols, *block, of_blocks, blocks)?;
                let product = Product { x: of_blocks, stride: blocks, bias: None, adds: true, ..operands };
                return self.product_with(sums, rows, product);
            }
            Source::Sparse24(matrix) => {
                Weights::Sparse24 { matrix, first: rows.start, rows: count, whole: linear.whole }
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

    /// Refuses what was computed from activations, keys or values that could not be quantised.
    pub(super) fn check_quantised(&self) -> Result<()> {
        let names = &self.model.quantised;
        if names.is_empty() {
            return Ok(());
        }
        let label = self.fault.view().read::<u32>(1).map_err(device)?[0] as usize;
        match label.checked_sub(1).and_then(|at| names.get(at)) {
            None => Ok(()),
            Some(name) => {
                self.fault.view().write(&[0u32]).map_err(device)?;
                Err(Error::Invalid(format!("{name} is NaN or infinite, or too large to quantise")))
            }
        }
    }

    /// Some words of a unit, which is decoded unless it was the last one: but for what belongs to experts.
    pub(super) fn unit(&self, unit: usize, first: usize, count: usize) -> gpu::Result<View<'_>> {
        if self.held.get() != Some(unit) {
            self.model.units[unit].decode_common(&self.model.gpu, self.scratch.view())?;
            self.held.set(Some(unit));
        }
        self.scratch.slice(2 * first..2 * (first + count))
    }

    /// The last norm of some rows of `h`.
    pub(super) fn last_norm(&self, tokens: Range<usize>, to: View<'_>) -> gpu::Result<()> {
        let m = self.model;
        let hidden = m.config.hidden_size;
        let h = self.h.slice(4 * tokens.start * hidden..4 * tokens.end * hidden)?;
        let eps = m.stream.eps;
        m.norm.apply(&m.gpu, h, hidden, tokens.len(), eps, to, padded(hidden))
    }

    /// Logits and likeliest successors of what is in `state`, of `count` sequences.
    pub(super) fn succeed(&self, count: usize) -> gpu::Result<()> {
        let m = self.model;
        let vocab = m.head().rows;
        self.product_of(m.head(), 0..vocab, self.state.view(), count, self.logits.view(), vocab, false)?;
        if let Some(cap) = m.config.final_softcap {
            soft_cap(&m.gpu, self.logits.view(), count * vocab, cap)?;
        }
        argmax(&m.gpu, self.logits.view(), count, vocab, self.best.view(), self.next.view())
    }

    /// One token of each sequence, whose ids are on the device.
    fn step(&self, count: usize) -> gpu::Result<()> {
        // What a recording decodes does not depend on what was decoded before it.
        self.held.set(None);
        self.run(count, 1, self.capacity, &Skips::new())?;
        self.last_norm(0..count, self.state.view())?;
        self.succeed(count)
    }

    /// A step by the recording for as many sequences; the first one runs as it is, so that kernels are loaded and shapes are picked.
    pub(super) fn single(&mut self, count: usize) -> gpu::Result<()> {
        match self.steps.get_mut(&count) {
            Some(Some(graph)) => {
                graph.replay()?;
                self.held.set(None);
            }
            Some(None) => {
                let mut graph = self.model.gpu.capture(|| self.step(count))?;
                graph.replay()?;
                self.held.set(None);
                self.steps.insert(count, Some(graph));
            }
            None => {
                self.step(count)?;
                self.steps.insert(count, None);
            }
        }
        Ok(())
    }
}
