//! What a pruning will change and take, from headers alone.

use std::collections::{BTreeMap, BTreeSet};

use llmpress_calibrate::Cut;
use llmpress_formats::{Checkpoint, Error, Removal, Result, Size};
use llmpress_model::{MlpConfig, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::{Method, Pass, Target};

/// What the process takes besides activations: code, tables, buffers of the threads.
const BASE_BYTES: u64 = 64 << 20;

/// A pruning that is still to be worked out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// How many go.
    pub removed: u64,
    /// Of how many.
    pub of: u64,
    /// Of what: attentions, MLPs, layers or sub-layers.
    pub what: String,
    /// Bytes of the tensors that go, at least: which ones is not known.
    pub dropped_bytes_least: u64,
    /// Bytes of the tensors that go, at most.
    pub dropped_bytes_most: u64,
    /// Windows that are read.
    pub windows: u64,
    /// Tokens of each.
    pub window: u64,
    /// Forward passes over a window, whole or from some sub-layer on.
    pub forward_passes: u64,
    /// Multiplications of weights with activations, in millions.
    pub million_products: u64,
    /// Memory that the ranking takes besides the weights, which are mapped.
    pub memory_bytes: u64,
}

/// A sub-layer of a checkpoint, or a whole layer.
#[derive(Clone, Copy)]
struct Candidate {
    layer: usize,
    attention: bool,
    mlp: bool,
    bytes: u64,
}

impl Candidate {
    fn is_of(&self, removal: &Removal) -> bool {
        self.attention && removal.attention.contains(&self.layer)
            || self.mlp && removal.mlp.contains(&self.layer)
    }
}

impl Pass {
    /// What it will do to a view, judged by windows cut so, and a removal that stands for the one it will choose: as many,
    /// from the end, and if possible none that is to `stay`.
    ///
    /// # Errors
    /// More than there are; a view whose sub-layers cannot be removed.
    pub fn forecast(&self, view: &Checkpoint, cut: Cut, stay: &Removal) -> Result<(Forecast, Removal)> {
        let config = view.config().ok_or_else(|| {
            Error::corrupt(
                view.root().join("config.json"),
                None,
                "is missing: it says how many layers there are",
            )
        })?;
        let config = ModelConfig::parse(config)?;
        let sizes = Removal::sizes(view)?;
        let candidates = self.candidates(&sizes);
        let count = self.amount.of(candidates.len(), self.what())?;
        let mut bytes: Vec<u64> = candidates.iter().map(|c| c.bytes).collect();
        bytes.sort_unstable();
        let sum = |bytes: &[u64]| bytes.iter().fold(0u64, |a, b| a.saturating_add(*b));
        let (least, most) = match self.portable && !self.is_block() {
            true => (0, 0),
            false => (sum(&bytes[..count]), sum(&bytes[bytes.len() - count..])),
        };
        let mut removal = Removal { portable: self.portable, ..Removal::default() };
        let (stays, goes): (Vec<&Candidate>, Vec<&Candidate>) =
            candidates.iter().rev().partition(|c| c.is_of(stay));
        for candidate in goes.into_iter().chain(stays).take(count) {
            if candidate.attention {
                removal.attention.insert(candidate.layer);
            }
            if candidate.mlp {
                removal.mlp.insert(candidate.layer);
            }
        }
        let (passes, products) = self.work(&config, view, &sizes, count, cut);
        let forecast = Forecast {
            removed: count as u64,
            of: candidates.len() as u64,
            what: self.what().to_owned(),
            dropped_bytes_least: least,
            dropped_bytes_most: most,
            windows: if self.calibrated() { cut.windows as u64 } else { 0 },
            window: if self.calibrated() { cut.length as u64 } else { 0 },
            forward_passes: passes,
            million_products: (products / 1_000_000).min(u128::from(u64::MAX)) as u64,
            memory_bytes: if self.calibrated() { self.memory(&config, view, cut) } else { 0 },
        };
        Ok((forecast, removal))
    }

    fn is_block(&self) -> bool {
        matches!(self.method, Method::Drop { target: Target::Block, .. })
    }

    /// What may go, first to last.
    fn candidates(&self, sizes: &BTreeMap<usize, [Size; 2]>) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for (&layer, [attention, mlp]) in sizes {
            let (has_attention, has_mlp) = (attention.elements > 0, mlp.elements > 0);
            let both = attention.bytes.saturating_add(mlp.bytes);
            let mut add = |attention, mlp, bytes| {
                candidates.push(Candidate { layer, attention, mlp, bytes });
            };
            match self.method {
                Method::Drop { target: Target::Block, .. } if has_attention && has_mlp => {
                    add(true, true, both)
                }
                Method::Drop { target: Target::Block, .. } => {}
                Method::Drop { target: Target::Attention, .. } if has_attention => {
                    add(true, false, attention.bytes);
                }
                Method::Drop { target: Target::Mlp, .. } if has_mlp => add(false, true, mlp.bytes),
                Method::Drop { target: Target::Attention | Target::Mlp, .. } => {}
                _ => {
                    if has_attention {
                        add(true, false, attention.bytes);
                    }
                    if has_mlp {
                        add(false, true, mlp.bytes);
                    }
                }
            }
        }
        candidates
    }

    /// Forward passes over a window, and products of weights with activations.
    fn work(
        &self,
        config: &ModelConfig,
        view: &Checkpoint,
        sizes: &BTreeMap<usize, [Size; 2]>,
        count: usize,
        cut: Cut,
    ) -> (u64, u128) {
        // What a token is multiplied with, sub-layer by sub-layer.
        let mut touched: Vec<(usize, u128)> = Vec::new();
        for (&layer, [attention, mlp]) in sizes {
            let of_mlp = match config.layers.get(layer).map(|l| l.mlp) {
                Some(MlpConfig::Experts { count, top_k, .. }) => {
                    u128::from(mlp.elements) * top_k as u128 / count.max(1) as u128
                }
                _ => u128::from(mlp.elements),
            };
            for elements in [u128::from(attention.elements), of_mlp] {
                if elements > 0 {
                    touched.push((layer, elements));
                }
            }
        }
        let whole: u128 = touched.iter().map(|(_, n)| n).sum();
        let (windows, tokens) = (cut.windows as u128, (cut.windows as u128) * (cut.length as u128));
        match self.method {
            Method::Random { .. } | Method::Last => (0, 0),
            Method::Drop { iterative, .. } => {
                let rounds = if iterative { count as u128 } else { 1 };
                let passes = (rounds * windows).min(u128::from(u64::MAX)) as u64;
                (passes, rounds * tokens * whole)
            }
            Method::FinerCut { protect, .. } => {
                let head = head_elements(config, view);
                let protected = (protect * config.layers.len() as f64).floor() as usize;
                let open: Vec<usize> = (0..touched.len()).filter(|i| touched[*i].0 >= protected).collect();
                // From a candidate on: on average half of what the open ones hold, and the head.
                let half = open.iter().map(|i| touched[*i].1).sum::<u128>() / 2;
                let (mut passes, mut products) = (0u128, 0u128);
                for round in 0..count {
                    let left = if round < open.len() { open.len() - round } else { touched.len() - round };
                    passes += left as u128;
                    products += whole + left as u128 * (half + head);
                }
                ((passes * windows).min(u128::from(u64::MAX)) as u64, products * tokens)
            }
        }
    }

    /// Memory of activations, and of what a search keeps of them.
    fn memory(&self, config: &ModelConfig, view: &Checkpoint, cut: Cut) -> u64 {
        let (tokens, layers) = (cut.length as u64, config.layers.len() as u64);
        let values = |n: u64| n.saturating_mul(tokens).saturating_mul(4);
        let intermediate = config.layers.iter().map(|l| match l.mlp {
            MlpConfig::Dense { intermediate } | MlpConfig::Plain { intermediate } => intermediate,
            MlpConfig::Experts { intermediate, top_k, .. } => intermediate.saturating_mul(top_k),
        });
        let hidden = config.hidden_size as u64;
        let heads = (config.heads * config.head_dim + 2 * config.kv_heads * config.head_dim) as u64;
        // The residual as it is and as it was, normed, and what a sub-layer makes of it.
        let activations = 6 * hidden + 2 * heads + 3 * intermediate.max().unwrap_or(0) as u64;
        let cache = layers.saturating_mul(2 * (config.kv_heads * config.head_dim) as u64);
        let mut total = BASE_BYTES.saturating_add(values(activations.saturating_add(cache)));
        if let Method::FinerCut { .. } = self.method {
            let vocab = (head_elements(config, view) / u128::from(hidden.max(1))) as u64;
            let kept = (2 * layers).saturating_add(cut.windows as u64).saturating_mul(hidden);
            total = total.saturating_add(values(kept.saturating_add(3 * vocab)));
        }
        total
    }
}

/// Weights of the head.
fn head_elements(config: &ModelConfig, view: &Checkpoint) -> u128 {
    let stored = view
        .tensors()
        .iter()
        .filter(|(name, _)| name.ends_with("lm_head.weight") || name.ends_with("embed_tokens.weight"));
    let rows: BTreeSet<u64> = stored.filter_map(|(_, t)| t.shape.first().copied()).collect();
    let rows = config.vocab_size.map(|n| n as u64).or(rows.last().copied()).unwrap_or(0);
    u128::from(rows) * config.hidden_size as u128
}
