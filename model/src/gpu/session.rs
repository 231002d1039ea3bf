//! Sequences on a GPU: their cache, their activations, and recorded steps.
//!
//! ```text
//! session.rs   memory, and the angles of positions
//! reading.rs   what a session is asked for: read, logits, pick
//! layers.rs    a step through the layers
//! experts.rs   an MLP of experts
//! ```

mod experts;
mod layers;
mod reading;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;

use llmpress_formats::{Error, Result};
use llmpress_kernels::gpu::abq::{self, integer};
use llmpress_kernels::gpu::attention::{Cache, Heads, workspace_bytes};
use llmpress_kernels::gpu::experts::Routing;
use llmpress_kernels::gpu::gate::Activation as Gate;
use llmpress_kernels::gpu::product::{Weights, Workspace, split_bytes};
use llmpress_kernels::gpu::sampling::{DRAW_WORKSPACE_BYTES, argmax_workspace_bytes};
use llmpress_kernels::gpu::{Buffer, Graph};

use super::weights::{GpuLinear, Source};
use super::{GpuLayer, GpuMlpBody, GpuModel, RUN_LOGITS, device};
use crate::ModelConfig;
use crate::config::Activation;
use crate::rope::cos_sin;
use experts::PlanBuffers;
pub(super) use experts::plan_bytes;

/// Most tokens that are read at a time.
pub(super) const CHUNK_TOKENS: usize = 2048;
/// Bytes for the tiles of attention of some tokens at a time, besides those of one token.
pub(super) const WORKSPACE_BYTES: usize = 16 << 20;
/// Positions whose angles are made at a time.
const ANGLES: usize = 1024;

/// A row of the input of a product: whole tiles.
pub(super) fn padded(features: usize) -> usize {
    features.next_multiple_of(64)
}

/// Tokens that sequences of so many together are read by.
pub(super) fn chunk(tokens: usize) -> usize {
    CHUNK_TOKENS.min(tokens.max(1))
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

/// Bytes of the inputs of MLPs that run beside attention: of so many tokens.
pub(super) fn beside_bytes(c: &ModelConfig, tokens: usize) -> usize {
    if c.blueprint.parallel { 2 * tokens * padded(c.hidden_size) } else { 0 }
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

/// Activations and the cache of sequences.
#[derive(Debug)]
pub(super) struct GpuSession<'a> {
    model: &'a GpuModel,
    /// Tokens that each has room for.
    capacity: usize,
    /// Tokens that each has.
    lengths: Vec<usize>,
    announced: usize,
    chunk: usize,
    /// Keys and values of each layer, one sequence after the other.
    cache: Vec<(Buffer, Buffer)>,
    angles: Vec<Angles>,
    /// Of the sequences at hand: how many, where each goes on, and its place in the cache.
    at_hand: usize,
    positions: Buffer,
    places: Buffer,
    ids: Buffer,
    /// The residual stream, F32.
    h: Buffer,
    /// Inputs of products, BF16.
    x: Buffer,
    /// Those of MLPs beside attention.
    beside: Buffer,
    /// Outputs of products, F32.
    y: Buffer,
    workspace: Buffer,
    products: Workspace,
    /// What blocks of inputs add up to, BF16: of matrices with sums.
    sums: Buffer,
    plan: PlanBuffers,
    /// A decoded unit, and which.
    scratch: Buffer,
    held: Cell<Option<usize>>,
    /// States of kept tokens, BF16, and how many of each sequence at hand.
    kept: Buffer,
    kept_tokens: usize,
    /// State, logits and likeliest successor of a single token of each.
    state: Buffer,
    logits: Buffer,
    next: Buffer,
    /// Where the likeliest token is looked for.
    best: Buffer,
    /// A random number, what a draw works in, and what it draws.
    random: Buffer,
    drawing: Buffer,
    drawn: Buffer,
    /// The label of what could not be quantised first, a matrix's activations or a layer's keys and values; 0: of none.
    fault: Buffer,
    /// Whether those are of the last kept token.
    picked: bool,
    /// By the number of sequences a step of one token each, once it ran.
    steps: BTreeMap<usize, Option<Box<dyn Graph>>>,
}

impl<'a> GpuSession<'a> {
    /// Room for so many sequences of `capacity` tokens.
    pub(super) fn new(model: &'a GpuModel, sequences: usize, capacity: usize) -> Result<Self> {
        let c = &model.config;
        let heads = model.heads();
        heads.check().map_err(device)?;
        let capacity = capacity.max(1);
        if sequences == 0 || sequences > CHUNK_TOKENS {
            return Err(Error::Invalid(format!(
                "{sequences} sequences at once: a GPU takes 1 to {CHUNK_TOKENS}"
            )));
        }
        let chunk = chunk(capacity.saturating_mul(sequences));
        // A token is spread over the whole GPU; more of them are where there is room.
        let workspace = workspace_bytes(heads, chunk, capacity).min(WORKSPACE_BYTES);
        let workspace = workspace.max(workspace_bytes(heads, sequences, capacity));
        let allocate = |bytes: usize| model.gpu.allocate(bytes).map_err(device);
        let cache_bytes = Cache::bytes(heads, capacity, model.cache_bits).saturating_mul(sequences);
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
        let terms = || model.layers.iter().flat_map(GpuLayer::linears).flat_map(GpuLinear::terms);
        let products = terms().map(|linear| match &linear.source {
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
            // As many tokens as are kept, or one of each sequence.
            Source::Integers { matrix, .. } => {
                integer::workspace_bytes(&model.gpu, integer::Weights::all(matrix), capacity.max(sequences))
            }
            _ => split_bytes(model.head().rows, model.head().rows, chunk),
        };
        let products = products.max().unwrap_or(0).max(of_head);
        let of_layers =
            model.layers.iter().flat_map(GpuLayer::linears).map(|linear| linear.sums_bytes(chunk));
        let of_head = model.head().sums_bytes(capacity.max(sequences));
        let sums = of_layers.max().unwrap_or(0).max(of_head);
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
        let row = padded(c.hidden_size);
        let session = Self {
            capacity,
            lengths: vec![0; sequences],
            announced: 0,
            chunk,
            cache: cache.collect::<Result<_>>()?,
            angles: angles.collect::<Result<_>>()?,
            at_hand: 0,
            positions: allocate(4 * sequences)?,
            places: allocate(4 * sequences)?,
            ids: allocate(4 * chunk)?,
            h: allocate(4 * chunk * c.hidden_size)?,
            x: allocate(2 * inputs)?,
            beside: allocate(beside_bytes(c, chunk))?,
            y: allocate(4 * outputs)?,
            workspace: allocate(workspace)?,
            products: Workspace::new(&model.gpu, products).map_err(device)?,
            sums: allocate(sums)?,
            plan: PlanBuffers::new(model, chunk)?,
            scratch: allocate(2 * model.scratch_elements())?,
            held: Cell::new(None),
            kept: allocate(0)?,
            kept_tokens: 0,
            state: allocate(2 * sequences * row)?,
            logits: allocate(4 * sequences * model.head().rows)?,
            next: allocate(4 * sequences)?,
            best: allocate(argmax_workspace_bytes(sequences, model.head().rows))?,
            random: allocate(8)?,
            drawing: allocate(DRAW_WORKSPACE_BYTES)?,
            drawn: allocate(4)?,
            fault: model.gpu.upload(&[0u32]).map_err(device)?,
            picked: false,
            steps: BTreeMap::new(),
            model,
        };
        // Several sequences leave room for what is taken when it is asked for: kept states and logits.
        let later = 2 * row * sequences * capacity + 4 * RUN_LOGITS;
        if sequences > 1 && model.gpu.backend().memory().map_err(device)?.0 < later {
            return Err(Error::Limit(format!(
                "{sequences} sequences of {capacity} tokens leave no room for their logits in the GPU's memory"
            )));
        }
        Ok(session)
    }

    /// Makes the angles of positions.
    fn make_angles(&mut self, wanted: Range<usize>) -> Result<()> {
        let total = self.announced.max(wanted.end);
        for (rope, angles) in self.model.config.ropes.iter().zip(&mut self.angles) {
            let (frequencies, scale) = rope.frequencies(total);
            if frequencies != angles.frequencies {
                angles.frequencies = frequencies;
                angles.made = wanted.start..wanted.start;
            }
            if angles.made.start <= wanted.start && angles.made.end >= wanted.end {
                continue;
            }
            let first = if angles.made.contains(&wanted.start) { angles.made.end } else { wanted.start };
            let last = wanted.end.max(first + ANGLES).min(self.capacity);
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
            angles.made = if first == angles.made.end { angles.made.start..last } else { first..last };
        }
        Ok(())
    }
}

impl GpuModel {
    fn heads(&self) -> Heads {
        heads(&self.config)
    }
}
