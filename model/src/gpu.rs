//! The decoder on a GPU: weights stay compressed in its memory, activations never leave it.
//!
//! ```text
//! ids -> embedding -> h (F32)      x = norm(h) (BF16)      h += W x      logits (F32)
//! ```
//!
//! Products take BF16 activations and add in F32; the residual stream, norms, scores and gates are F32. Keys and
//! values are kept in BF16, or as codes of 8 or 4 bits where the model says so. One token at a time is a recorded graph of launches.

mod experts;
mod needs;
mod norms;
mod parts;
mod session;
mod weights;

use std::ops::Range;
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Error, QuantizeSite, Result, Transform};
use llmpress_kernels::gpu::picker::Picker;
use llmpress_kernels::gpu::{self, Buffer, Gpu};

use experts::{ExpertLinear, ExpertSource, GpuExperts};
use llmpress_kernels::gpu::experts::Routing;
pub use needs::GpuNeeds;
use norms::GpuNorm;
use weights::{GpuLinear, LayerLinears, Loader};

use crate::attention::{HeadNorms, Projections};
use crate::config::Activation;
use crate::linear::Linear;
use crate::mlp::{GateUp, Gated, Mlp};
use crate::norm::Norm;
use crate::{Batch, Engine, Model, ModelConfig, Session, Weights};

/// Logits that are copied from the device at a time.
const RUN_LOGITS: usize = 16 << 20;

/// What went wrong on the device, as an error of a model.
fn device(error: gpu::Error) -> Error {
    match error {
        gpu::Error::Memory { .. } => Error::Limit(error.to_string()),
        _ => Error::Invalid(error.to_string()),
    }
}

/// A decoder on a GPU.
#[derive(Debug)]
pub struct GpuModel {
    gpu: Gpu,
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
    stream: parts::Stream,
    picker: Picker,
    units: Vec<gpu::dfloat11::Unit>,
    /// What is quantised when it is computed, by labels from 1 on: activations of matrices, keys and values of layers.
    quantised: Vec<String>,
    /// Bits in which the cache holds keys and values; none: BF16.
    cache_bits: Option<u8>,
    embedding: GpuLinear,
    /// Embeddings of positions, F32, and how many there are.
    positions: Option<(Buffer, usize)>,
    layers: Vec<GpuLayer>,
    norm: GpuNorm,
    /// The embedding where there is none.
    head: Option<GpuLinear>,
}

#[derive(Debug)]
struct GpuLayer {
    attention: Option<GpuAttention>,
    mlp: Option<GpuMlp>,
}

impl GpuLayer {
    fn linears(&self) -> impl Iterator<Item = &GpuLinear> {
        let attention = self.attention.iter().flat_map(|a| a.projections.iter().chain([&a.output]));
        attention.chain(self.mlp.iter().flat_map(|mlp| match &mlp.body {
            GpuMlpBody::Dense { gate_up, down, .. } => gate_up.iter().chain(Some(&**down)),
            GpuMlpBody::Experts(experts) => std::slice::from_ref(&experts.router).iter().chain(None),
        }))
    }

    fn experts(&self) -> Option<&GpuExperts> {
        match &self.mlp.as_ref()?.body {
            GpuMlpBody::Experts(experts) => Some(experts),
            GpuMlpBody::Dense { .. } => None,
        }
    }
}

#[derive(Debug)]
struct GpuAttention {
    norm: GpuNorm,
    post_norm: Option<Buffer>,
    /// Query, key and value: three matrices, or one where they could be stacked.
    projections: Vec<GpuLinear>,
    output: GpuLinear,
    qk_norm: QkNorm,
    window: Option<usize>,
    rope: usize,
    /// Of its keys and values, where they are quantised.
    label: u32,
}

/// Norms of queries and of keys.
#[derive(Debug)]
enum QkNorm {
    None,
    /// Of each head.
    Heads(Buffer, Buffer),
    /// Of all heads together.
    Whole(Buffer, Buffer),
}

#[derive(Debug)]
struct GpuMlp {
    norm: GpuNorm,
    post_norm: Option<Buffer>,
    body: GpuMlpBody,
    activation: Activation,
}

#[derive(Debug)]
enum GpuMlpBody {
    Dense {
        /// Gate and up: two matrices, or one where they could be stacked; or one that has no gate.
        gate_up: Vec<GpuLinear>,
        down: Box<GpuLinear>,
        gated: bool,
    },
    Experts(Box<GpuExperts>),
}

/// The matrices of a layer.
fn layer_linears(model: &Model, index: usize) -> Result<LayerLinears<'_>> {
    let layer = &model.layers[index];
    let mut all = LayerLinears::default();
    if let Some(attention) = &layer.attention {
        all.groups.push(match &attention.body.projections {
            Projections::Separate(all) => all.iter().collect(),
            Projections::Fused(one) => vec![one],
            Projections::Latent(latent) => latent.readers.iter().collect(),
        });
        all.groups.push(vec![&attention.body.output]);
    }
    all.of_attention = all.groups.len();
    match layer.mlp.as_ref().map(|mlp| (&mlp.body, &mlp.post_norm)) {
        None => {}
        Some((Mlp::Dense(gated), _)) => all.groups.extend([gate_up(gated), vec![&gated.down]]),
        Some((Mlp::Experts { router, experts, .. }, None)) => {
            all.groups.push(vec![router]);
            all.gate_up = experts.iter().map(gate_up).collect();
            all.down = experts.iter().map(|gated| vec![&gated.down]).collect();
        }
        Some((Mlp::Experts { .. }, Some(_))) => {
            return Err(Error::unsupported(
                model.checkpoint.root(),
                None,
                format!(
                    "layer {index} has a norm after its experts, which does not run on a GPU: leave out --device cuda"
                ),
            ));
        }
    }
    Ok(all)
}

/// Gate and up.
fn gate_up(gated: &Gated) -> Vec<&Linear> {
    match &gated.gate_up {
        GateUp::Separate(both) => both.iter().collect(),
        GateUp::Fused(one) | GateUp::Interleaved(one) | GateUp::Alone(one) => vec![one],
    }
}

/// Whether an MLP is a function of one matrix alone.
fn is_ungated(mlp: &Mlp) -> bool {
    matches!(mlp, Mlp::Dense(gated) if matches!(gated.gate_up, GateUp::Alone(_)))
}

/// How tokens find the experts of a layer, if it has them.
fn routing(model: &Model, index: usize) -> Result<Option<Routing>> {
    let mlp = model.layers[index].mlp.as_ref().map(|mlp| &mlp.body);
    let Some(Mlp::Experts { experts, picking, .. }) = mlp else { return Ok(None) };
    let picks = picking.picks;
    let routing = Routing { experts: experts.len(), top_k: picks.top_k, normalise: picks.normalise };
    routing.check().map_err(device)?;
    Ok(Some(routing))
}

impl GpuModel {
    /// Copies a model to a GPU. `trying`: pick each product's tile shape by trying a few, which costs a moment and
    /// never changes a bit.
    ///
    /// # Errors
    /// Experts that do not run on a GPU; not so much memory; weights that cannot be read.
    pub fn open(gpu: Gpu, model: &Model, weights: Weights, trying: bool) -> Result<Self> {
        let is_cache = |t: &&Transform| matches!(t, Transform::Quantize { site: QuantizeSite::Cache, .. });
        let others: Vec<Transform> = model.transforms().iter().filter(|t| !is_cache(t)).cloned().collect();
        Transform::refuse_online(
            &others,
            model.checkpoint.root(),
            "which does not run on a GPU: leave out --device cuda",
        )?;
        let (free, total) = gpu.backend().memory().map_err(device)?;
        needs::check(model, weights, free, total)?;
        let checkpoint = model.checkpoint.clone();
        let config = model.config().clone();
        let mut loader = Loader::new(&gpu, &checkpoint, weights);
        let upload = |values: &[f32]| gpu.upload(values).map_err(device);
        let optional = |norm: &Option<Norm>| norm.as_ref().map(|norm| upload(&norm.weight)).transpose();
        // Rows are gathered from it: it is never a part of a unit, unless it is stored so.
        let embedding = loader.table(&model.embedding)?;
        let positions = model.positions.as_ref().map(|positions| -> Result<_> {
            let mut table = vec![0.0; positions.rows() * positions.cols()];
            for (row, out) in table.chunks_exact_mut(positions.cols().max(1)).enumerate() {
                positions.row(&checkpoint, row, out)?;
            }
            Ok((upload(&table)?, positions.rows()))
        });
        let tied = model.head.tensor() == model.embedding.tensor();
        let head = if tied { None } else { Some(loader.matrix(&model.head)?) };
        let mut layers = Vec::with_capacity(model.layers.len());
        for (index, layer) in model.layers.iter().enumerate() {
            // A layer's matrices are loaded together: they may share a unit.
            let linears = layer_linears(model, index)?;
            let loaded_layer = loader.layer(&linears)?;
            let mut loaded = loaded_layer.groups;
            let mut of_mlp = loaded.split_off(linears.of_attention);
            let last = |of: &mut Vec<Vec<GpuLinear>>| of.pop().and_then(|mut group| group.pop());
            let attention = match (&layer.attention, last(&mut loaded)) {
                (Some(attention), Some(output)) => Some(GpuAttention {
                    norm: GpuNorm::upload(&gpu, attention.norm.as_ref(), 1.0)?,
                    post_norm: optional(&attention.post_norm)?,
                    projections: loaded.into_iter().flatten().collect(),
                    output,
                    qk_norm: match &attention.body.qk_norm {
                        HeadNorms::None => QkNorm::None,
                        HeadNorms::Heads(q, k) => QkNorm::Heads(upload(q)?, upload(k)?),
                        HeadNorms::Whole(q, k) => QkNorm::Whole(upload(&q.weight)?, upload(&k.weight)?),
                    },
                    window: attention.body.window,
                    rope: attention.body.rope,
                    label: 0,
                }),
                _ => None,
            };
            let body = match (last(&mut of_mlp), routing(model, index)?, loaded_layer.down) {
                (Some(router), Some(routing), Some(down)) => {
                    let gate_up = loaded_layer.gate_up;
                    Some(GpuMlpBody::Experts(Box::new(GpuExperts { routing, router, gate_up, down })))
                }
                (Some(down), ..) => Some(GpuMlpBody::Dense {
                    gate_up: of_mlp.into_iter().flatten().collect(),
                    down: Box::new(down),
                    gated: !layer.mlp.as_ref().is_some_and(|mlp| is_ungated(&mlp.body)),
                }),
                _ => None,
            };
            let mlp = match (&layer.mlp, body) {
                (Some(mlp), Some(body)) => Some(GpuMlp {
                    norm: GpuNorm::upload(&gpu, mlp.norm.as_ref(), 1.0)?,
                    post_norm: optional(&mlp.post_norm)?,
                    body,
                    activation: config.activation,
                }),
                _ => None,
            };
            layers.push(GpuLayer { attention, mlp });
        }
        // Logits that are scaled are those of a scaled state.
        let norm = GpuNorm::upload(&gpu, Some(&model.norm), config.logit_scale)?;
        let (units, matrices) = loader.finish();
        let mut quantised: Vec<String> =
            matrices.iter().map(|name| format!("an activation that {name} multiplies")).collect();
        let cache_bits = model.cache_bits();
        for (index, layer) in layers.iter_mut().enumerate() {
            if let Some(attention) = layer.attention.as_mut().filter(|_| cache_bits.is_some()) {
                quantised.push(format!("a key or value of layer {index}"));
                attention.label = quantised.len() as u32;
            }
        }
        let picker = if trying { Picker::trying() } else { Picker::first() };
        Ok(Self {
            checkpoint,
            stream: parts::Stream::of(&config),
            config,
            picker,
            units,
            quantised,
            cache_bits,
            embedding,
            positions: positions.transpose()?,
            layers,
            norm,
            head,
            gpu,
        })
    }

    /// Bytes in the GPU's memory now, and the most there were.
    pub fn allocated(&self) -> (usize, usize) {
        self.gpu.allocated()
    }

    fn head(&self) -> &GpuLinear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Elements of the largest unit: what the scratch buffer must hold.
    fn scratch_elements(&self) -> usize {
        self.units.iter().map(gpu::dfloat11::Unit::elements).max().unwrap_or(0)
    }
}

impl Engine for GpuModel {
    fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn vocab_size(&self) -> usize {
        self.head().rows
    }

    fn logit_runs(&self, tokens: usize) -> Vec<Range<usize>> {
        let step = (RUN_LOGITS / tokens.max(1)).next_multiple_of(16).max(16);
        (0..self.vocab_size())
            .step_by(step)
            .map(|first| first..(first + step).min(self.vocab_size()))
            .collect()
    }

    fn session(&self, capacity: usize) -> Result<Box<dyn Session + '_>> {
        Ok(Box::new(session::GpuSession::new(self, 1, capacity)?))
    }

    fn batch(&self, sequences: usize, capacity: usize) -> Result<Box<dyn Batch + '_>> {
        Ok(Box::new(session::GpuSession::new(self, sequences, capacity)?))
    }

    /// As many as are read at a time anyway.
    fn suited_batch(&self, length: usize) -> usize {
        (session::CHUNK_TOKENS / length.max(1)).max(1)
    }
}
