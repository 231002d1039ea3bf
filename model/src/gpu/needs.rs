//! What a model takes of a GPU's memory, from headers alone: said before anything is loaded.

use std::collections::{BTreeMap, BTreeSet};

use llmpress_entropy::fixed12::Grid;
use llmpress_formats::encoding::abq::Abq;
use llmpress_formats::encoding::lowrank::{Base, Lowrank, SUMS, SumsEncoding};
use llmpress_formats::{Dtype, Encoding, Error, Result};
use llmpress_kernels::gpu::attention::{Cache, workspace_bytes};
use llmpress_kernels::gpu::dense::row_stride;
use llmpress_kernels::gpu::product::split_bytes;
use llmpress_kernels::gpu::sampling::{DRAW_WORKSPACE_BYTES, argmax_workspace_bytes};
use llmpress_kernels::gpu::sparse24;
use serde::Serialize;

use super::session::{WORKSPACE_BYTES, beside_bytes, chunk, heads, mlp_elements, padded, plan_bytes};
use super::weights::{
    LayerLinears, decodes_in_place, element, plain_bytes, stays_abq, stays_fp8, stays_lowrank, stays_sparse,
    stored,
};
use super::{RUN_LOGITS, layer_linears, routing};
use crate::linear::Linear;
use crate::{Model, Weights};

/// DFloat11's size by that of BF16, with the counts that a GPU keeps: what models' weights come to, within a percent.
const DFLOAT11_RATIO: f64 = 0.70;
/// dfloat8's size by that of FP8, in the same way.
const DFLOAT8_RATIO: f64 = 0.89;
/// Bytes of a fixed12 tile of 16 x 64 weights, and of where its escapes begin.
const FIXED12_TILE: u64 = 1536 + 4;

/// Bytes of a GPU's memory that a model takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GpuNeeds {
    /// Weights, as they lie there: where they are encoded anew, to some percent.
    pub weights: u64,
    /// Keys and values of one sequence.
    pub cache: u64,
    /// Activations, and what products, attention and logits work in.
    pub workspace: u64,
}

impl GpuNeeds {
    /// What a model takes with its weights in this form, and a sequence of `capacity` tokens.
    ///
    /// # Errors
    /// Experts, heads and other parts that no kernel does, by name; a tensor that is missing.
    pub fn of(model: &Model, weights: Weights, capacity: usize) -> Result<Self> {
        Self::counted(model, weights, None, capacity)
    }

    /// What a model will take, as it is stored, when its tensors are encoded so: what is not named stays plain.
    ///
    /// # Errors
    /// Those of [`Self::of`].
    pub fn planned(model: &Model, encodings: &BTreeMap<&str, Encoding>, capacity: usize) -> Result<Self> {
        Self::counted(model, Weights::Stored, Some(encodings), capacity)
    }

    fn counted(
        model: &Model,
        weights: Weights,
        planned: Option<&BTreeMap<&str, Encoding>>,
        capacity: usize,
    ) -> Result<Self> {
        super::parts::check(model)?;
        let (units, chunk) = (BTreeSet::new(), chunk(capacity));
        let mut sizes =
            Sizes { model, weights, planned, units, bytes: 0, scratch: 0, chunk, decoded: 0, sums: 0 };
        sizes.matrix(&model.embedding, true)?;
        sizes.bytes += model.positions.as_ref().map_or(0, |p| 4 * (p.rows() * p.cols()) as u64);
        if model.head.tensor() != model.embedding.tensor() {
            sizes.matrix(&model.head, false)?;
        }
        let mut splits = split_bytes(model.head.rows(), model.head.rows(), capacity);
        let mut attentions = 0u64;
        let c = model.config();
        let heads = heads(c);
        heads.check().map_err(super::device)?;
        let qkv = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
        let mut inputs = chunk * padded(c.hidden_size.max(heads.heads * heads.head_dim));
        let mut outputs = chunk * qkv.max(c.hidden_size);
        let mut routings = Vec::new();
        for index in 0..model.layers.len() {
            let linears = layer_linears(model, index)?;
            attentions += u64::from(model.layers[index].attention.is_some());
            sizes.layer(&linears)?;
            for group in &linears.groups {
                let rows = group.iter().map(|linear| linear.rows()).sum();
                splits = splits.max(split_bytes(rows, rows, chunk));
            }
            let of_experts = routing(model, index)?;
            routings.extend(of_experts);
            let down =
                linears.down.first().or(linears.groups.last().filter(|_| model.layers[index].mlp.is_some()));
            if let Some(down) = down.and_then(|group| group.first()) {
                let (input, output) = mlp_elements(c.hidden_size, down.cols(), of_experts, chunk);
                (inputs, outputs) = (inputs.max(input), outputs.max(output));
            }
        }
        let vocab = model.vocab_size();
        let plan: usize = plan_bytes(routings.into_iter(), chunk).iter().sum();
        let activations =
            4 * chunk * c.hidden_size + 2 * inputs + beside_bytes(c, chunk) + 4 * outputs + plan;
        let attention = workspace_bytes(heads, chunk, capacity)
            .min(WORKSPACE_BYTES)
            .max(workspace_bytes(heads, 1, capacity));
        let angles: usize = c.ropes.iter().map(|rope| 8 * capacity * rope.frequencies(1).0.len()).sum();
        let logits = 4 * vocab
            + 4 * RUN_LOGITS.min(chunk * vocab)
            + DRAW_WORKSPACE_BYTES
            + argmax_workspace_bytes(1, vocab);
        let rest = activations + attention + angles + logits + splits;
        Ok(Self {
            weights: sizes.bytes,
            cache: 2 * attentions * Cache::bytes(heads, capacity, model.cache_bits()) as u64,
            workspace: rest as u64 + sizes.scratch + sizes.decoded + sizes.sums,
        })
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.workspace)
    }
}

/// Adds up matrices.
struct Sizes<'a> {
    model: &'a Model,
    weights: Weights,
    /// How tensors are going to be encoded.
    planned: Option<&'a BTreeMap<&'a str, Encoding>>,
    /// Units that are counted already.
    units: BTreeSet<String>,
    bytes: u64,
    /// Of the largest unit, decoded.
    scratch: u64,
    /// Tokens that are read at a time.
    chunk: usize,
    /// Of the largest group of matrices that products decode, with what they make of their inputs.
    decoded: u64,
    /// What blocks of inputs add up to, of the matrix that has the most.
    sums: u64,
}

impl Sizes<'_> {
    fn layer(&mut self, layer: &LayerLinears<'_>) -> Result<()> {
        let mut groups = layer.groups.clone();
        let unit = match self.planned {
            None => layer.becomes_unit(&self.model.checkpoint, self.weights)?,
            Some(_) => {
                let mut all = true;
                for linear in layer.members() {
                    all &= decodes_in_place(linear) && matches!(self.encoding(linear)?, Encoding::Dfloat11);
                }
                all
            }
        };
        if unit {
            let plain: u64 = layer.members().map(plain_bytes).sum();
            self.bytes += (plain as f64 * DFLOAT11_RATIO) as u64;
            self.scratch = self.scratch.max(plain);
            // A router is no part of it.
            groups =
                groups.split_off(if layer.gate_up.is_empty() { groups.len() } else { layer.of_attention });
        } else {
            for linear in layer.gate_up.iter().chain(&layer.down).flatten() {
                self.expert(linear)?;
                match self.encoding(linear)? {
                    // Experts lie with their zeros and sums, and FP8 decoded.
                    Encoding::Sparse24(_) | Encoding::Lowrank(_) | Encoding::Scaled(_) => {
                        self.bytes += plain_bytes(linear);
                    }
                    _ => _ = self.matrix(linear, false)?,
                }
            }
        }
        for group in &groups {
            let before = self.bytes;
            let (mut decoded, mut of_x) = (false, 0);
            for linear in group {
                decoded |= self.matrix(linear, false)?;
                if stays_abq(&self.encoding(linear)?, self.weights).is_some() {
                    // What x adds up to over every half tile, or its codes and their sums: of 32 columns of a token.
                    of_x = (self.chunk * linear.cols().div_ceil(32) * 40) as u64;
                }
            }
            if self.bytes > before {
                // Words of BF16, whatever the weights are made of.
                let words = group.iter().map(|l| plain_bytes(l) / element(l).bytes() as u64 * 2);
                let decoded: u64 = if decoded { words.sum() } else { 0 };
                self.decoded = self.decoded.max(decoded + of_x);
            }
        }
        Ok(())
    }

    /// Refuses an expert that would be multiplied from its codes.
    fn expert(&self, linear: &Linear) -> Result<()> {
        let refuse = |what: &str| {
            let root = self.model.checkpoint.root();
            Err(Error::unsupported(root, Some(linear.tensor()), format!("is an expert {what} --device cuda")))
        };
        match stays_abq(&self.encoding(linear)?, self.weights) {
            None => Ok(()),
            Some(Abq { activation_bits: None, .. }) => refuse(
                "stored as abq, which is not multiplied on a GPU yet: --weights bf16 decodes it once, or leave out",
            ),
            Some(_) => refuse("whose activations are quantised, which is not done on a GPU yet: leave out"),
        }
    }

    /// Whether products of many tokens decode it. `table`: rows are gathered from it.
    fn matrix(&mut self, linear: &Linear, table: bool) -> Result<bool> {
        let encoding = self.encoding(linear)?;
        let bias = 4 * linear.bias().map_or(0, <[f32]>::len) as u64;
        self.bytes += bias;
        if let Some(abq) = stays_abq(&encoding, self.weights).filter(|_| !table) {
            let (rows, cols) = (linear.rows().next_multiple_of(16) as u64, linear.cols());
            let tile = if abq.activation_bits.is_some() { 128 } else { 64 };
            let codes = rows * cols.next_multiple_of(tile) as u64 * u64::from(abq.planes()) / 8;
            // A scale and an offset; for integers the sum of the codes besides.
            let each = if abq.activation_bits.is_some() { 12 } else { 8 };
            self.bytes += codes + rows * abq.groups(cols) as u64 * each;
            return Ok(abq.activation_bits.is_none());
        }
        if self.planned.is_none()
            && !table
            && stays_fp8(&self.model.checkpoint, linear, self.weights)?.is_some()
        {
            let checkpoint = &self.model.checkpoint;
            let elements = (linear.rows() * linear.cols()) as u64;
            let stored = checkpoint.unit_of(checkpoint.tensor(linear.tensor())?)?.stored_bytes();
            // A count for every 16 bytes of the stream, and scales in single precision.
            self.bytes += stored + stored.saturating_sub(elements / 2) / 16;
            self.scratch = self.scratch.max(2 * elements);
            return Ok(false);
        }
        // Only a plan says so of a matrix: what is stored has scales around it.
        if encoding == Encoding::Dfloat8 && !table && decodes_in_place(linear) {
            let elements = (linear.rows() * linear.cols()) as u64;
            self.bytes += (elements as f64 * DFLOAT8_RATIO) as u64 + 4 * linear.rows() as u64;
            self.scratch = self.scratch.max(2 * elements);
            return Ok(false);
        }
        if let Some(in_fixed12) = stays_sparse(&encoding, self.weights, linear).filter(|_| !table) {
            self.bytes += sparse24::Matrix::bytes_of(linear.rows(), linear.cols(), in_fixed12);
            return Ok(false);
        }
        if let Some(lowrank) = stays_lowrank(&encoding, self.weights, linear).filter(|_| !table) {
            self.with_sums(linear, lowrank)?;
            return Ok(false);
        }
        match (self.weights, encoding) {
            (Weights::Stored | Weights::Fixed12, Encoding::Fixed12 { .. }) | (Weights::Fixed12, _)
                if linear.dtype() == Dtype::BF16 =>
            {
                let grid = Grid::new(linear.rows() as u64, linear.cols() as u64);
                let tiles = grid.map_or(0, |grid| grid.tiles());
                self.bytes += tiles.saturating_mul(FIXED12_TILE);
                return Ok(true);
            }
            (Weights::Stored | Weights::Dfloat11, Encoding::Dfloat11)
                if !table && decodes_in_place(linear) =>
            {
                if self.planned.is_some() {
                    self.bytes += (plain_bytes(linear) as f64 * DFLOAT11_RATIO) as u64;
                    self.scratch = self.scratch.max(plain_bytes(linear));
                    return Ok(false);
                }
                let checkpoint = &self.model.checkpoint;
                let info = checkpoint.tensor(linear.tensor())?;
                let unit = checkpoint.unit_of(info)?;
                if self.units.insert(info.unit.to_string()) {
                    let elements: u64 =
                        unit.parts().iter().map(|part| part.shape.iter().product::<u64>()).sum();
                    // A count for every 16 bytes of the stream.
                    self.bytes += unit.stored_bytes() + unit.stored_bytes().saturating_sub(elements) / 16;
                    self.scratch = self.scratch.max(2 * elements);
                }
            }
            _ => self.bytes += plain_bytes(linear),
        }
        Ok(false)
    }

    /// A base and its sums.
    fn with_sums(&mut self, linear: &Linear, lowrank: Lowrank) -> Result<()> {
        let (rows, blocks) = (linear.rows(), lowrank.blocks(linear.cols() as u64) as usize);
        self.bytes += match lowrank.base {
            Base::Raw => plain_bytes(linear),
            Base::Sparse24(sparse) => {
                sparse24::Matrix::bytes_of(rows, linear.cols(), sparse.values.is_some())
            }
        };
        self.bytes += match lowrank.sums {
            Some(SumsEncoding::Abq(abq)) => {
                let rows = rows.next_multiple_of(16) as u64;
                let codes = rows * blocks.next_multiple_of(64) as u64 * u64::from(abq.planes()) / 8;
                codes + rows * abq.groups(blocks) as u64 * 8
            }
            None => {
                let unit = self.model.checkpoint.unit_of(self.model.checkpoint.tensor(linear.tensor())?)?;
                let bits = unit.components().get(SUMS).map_or(16, |sums| sums.dtype().bits());
                (rows * row_stride(blocks)) as u64 * u64::from(bits) / 8
            }
        };
        self.sums = self.sums.max((2 * self.chunk * padded(blocks)) as u64);
        Ok(())
    }

    fn encoding(&self, linear: &Linear) -> Result<Encoding> {
        let checkpoint = &self.model.checkpoint;
        if linear.is_transposed() {
            return Ok(Encoding::Raw);
        }
        if let Some(planned) = self.planned {
            let (tensor, tied) = (linear.tensor(), checkpoint.tied());
            let tensor = tied.get(tensor).map_or(tensor, String::as_str);
            return Ok(planned.get(tensor).cloned().unwrap_or(Encoding::Raw));
        }
        stored(checkpoint, linear)
    }
}

fn size(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes < 1e9 => format!("{:.1} MB", bytes / 1e6),
        bytes => format!("{:.2} GB", bytes / 1e9),
    }
}

/// Refuses a model that a GPU has no room for, before anything is loaded.
pub(super) fn check(model: &Model, weights: Weights, free: usize, total: usize) -> Result<()> {
    // The shortest sequence: longer ones find out when they begin.
    let needs = GpuNeeds::of(model, weights, 1)?;
    if needs.weights > free as u64 {
        return Err(Error::Limit(format!(
            "the weights of {} take {} of the GPU's memory, of which {} of {} are free: keep them smaller with --weights \
             dfloat11 or fixed12, or leave out --device cuda",
            model.checkpoint.root().display(),
            size(needs.weights),
            size(free as u64),
            size(total as u64),
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, clippy::unwrap_used)]
    use std::path::Path;
    use std::sync::Arc;

    use llmpress_formats::Checkpoint;

    use super::*;

    #[test]
    fn a_model_that_does_not_fit_is_refused_with_the_sizes_and_what_helps() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm");
        let model = Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap();
        let needs = GpuNeeds::of(&model, Weights::Bf16, 100).unwrap();
        check(&model, Weights::Bf16, needs.weights as usize, 1 << 30).unwrap();
        let error = check(&model, Weights::Bf16, needs.weights as usize - 1, 1 << 30).unwrap_err();
        assert!(matches!(error, Error::Limit(_)));
        let text = error.to_string();
        for part in ["tinylm", &size(needs.weights), "of 1.07 GB", "fixed12"] {
            assert!(text.contains(part), "{text}");
        }
        // What is smaller may fit.
        check(&model, Weights::Fixed12, needs.weights as usize - 1, 1 << 30).unwrap();
    }
}
