//! What a quantising pass will leave and take, from headers alone.

use std::collections::{BTreeMap, BTreeSet};

use llmpress_calibrate::Cut;
use llmpress_formats::encoding::abq;
use llmpress_formats::{Checkpoint, Tensor, block_linears};
use llmpress_learn::{Head, MOST_LOGIT_BYTES};
use llmpress_quantize::{
    Grain, InputShape, Rung, Spec, Transformations, block_peak_bytes, expected_bits, makes_up,
};
use serde::{Deserialize, Serialize};

use super::run::MEMORY;
use super::targets::Assigned;
use super::whole;
use crate::{Error, Result};

/// What the process takes besides weights and activations: code, tables, buffers of the threads.
const BASE_BYTES: u64 = 64 << 20;
/// Bytes a weight of the matrix in work takes: itself, what is left of it, its value, its code.
const WORK_BYTES: u64 = 13;
/// Bytes that a weight takes while its sub-layer is learned: place, means of two kinds, derivative, value, transposed.
const LEARN_BYTES: u64 = 24;
/// More of them where scales or a compensation are learned beside: what it is moved from and by, and the derivative by that.
const BESIDE_BYTES: u64 = 12;
/// Bytes of a weight where the whole model is learned: what its sub-layer takes, and its code in the best state and in the one that may be better.
const WHOLE_BYTES: u64 = LEARN_BYTES + 2;
/// Those of a weight that stays as it is there: itself, turned, and a derivative that nobody takes.
const STILL_BYTES: u64 = 12;
/// Those of a group's grid there: before and after it is rounded, at the start, means, twice in states.
const GRID_BYTES: u64 = 60;
/// Bytes of a weight in a state of it: place, means, code; of which one lies beside the next.
const STATE_BYTES: u64 = 2 * 13;
/// Values of a token that each layer keeps for the way back, in sizes of its inputs.
const KEPT: u64 = 24;
/// Products with each weight that a token takes in a step of learning: forward, and back to weights and inputs.
const LEARN_PRODUCTS: u128 = 3;
/// One in so many tries moves a code of an expert that is learned, which takes as many products as there are columns.
const LEARN_TRIES: u128 = 2;

/// A quantising pass that is still to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantiseForecast {
    /// Tensors that are quantised.
    pub tensors: u64,
    /// Their weights.
    pub weights: u64,
    /// Their bytes in the source.
    pub source_bytes: u64,
    /// Their bytes when they are quantised, with scales and zero points of 16 bits, which few matrices exceed. The stage
    /// takes as much disk until the job is done.
    pub bytes: u64,
    /// The same by weight.
    pub bits_per_weight: f64,
    /// Windows that are read; none where nothing goes by a text.
    pub windows: u64,
    /// Tokens of each.
    pub window: u64,
    /// Multiplications, in millions: of weights with activations, of second moments, of error feedback, of learning.
    pub million_products: u64,
    /// Bytes of disk that residual streams take at most while it runs: those after the last two finished blocks for a moment, and
    /// those in work where they do not fit the memory.
    #[serde(default)]
    pub stream_bytes: u64,
    /// Memory that it takes besides the weights, which are mapped.
    pub memory_bytes: u64,
}

/// Bytes of a quantised tensor; of one whose width is to be assigned those of the mean.
pub(crate) fn expected_bytes(name: &str, spec: &Spec, tensor: &Tensor, assigned: Option<&Assigned>) -> u64 {
    let (rows, cols) = abq::matrix(&tensor.shape).unwrap_or_default();
    match assigned.filter(|assigned| assigned.tensors.contains(name)) {
        Some(assigned) => (assigned.mean.bits() * (rows * cols) as f64 / 8.0) as u64,
        None => expected_bits(spec, rows, cols) / 8,
    }
}

/// What it comes to on a view, by windows cut so.
pub(crate) fn forecast(
    view: &Checkpoint,
    specs: &BTreeMap<String, Spec>,
    with: &Transformations,
    assigned: Option<&Assigned>,
    cut: Cut,
) -> Result<QuantiseForecast> {
    let by_text = |spec: &Spec| spec.rung != Rung::Rtn;
    let any_text = specs.values().any(by_text) || assigned.is_some() || with.smooth;
    let (windows, window) = if any_text { (cut.windows as u64, cut.length as u64) } else { (0, 0) };
    let tokens = u128::from(windows) * u128::from(window);
    let mut found = QuantiseForecast {
        tensors: specs.len() as u64,
        weights: 0,
        source_bytes: 0,
        bytes: 0,
        bits_per_weight: 0.0,
        windows,
        window,
        million_products: 0,
        stream_bytes: 0,
        memory_bytes: BASE_BYTES,
    };
    let mut products = 0u128;
    let mut largest = 0;
    let mut inputs: BTreeSet<(&str, u64)> = BTreeSet::new();
    // Bytes of each sub-layer or block that is learned.
    let mut learned: BTreeMap<&str, u64> = BTreeMap::new();
    let mut both = false;
    for (name, spec) in specs {
        let tensor = view.tensor(name)?;
        let (rows, cols) = abq::matrix(&tensor.shape).unwrap_or_default();
        let weights = rows * cols;
        found.weights += weights;
        found.source_bytes += tensor.bytes;
        found.bytes += expected_bytes(name, spec, tensor, assigned);
        largest = largest.max(weights);
        // Once for what they multiply, once for what comes out.
        products += 2 * tokens * u128::from(weights);
        if let Some(learn) = spec.learn {
            let (of, bytes) = match learn.grain {
                // An expert is learned from its second moments, in the memory that error feedback takes.
                _ if name.contains(".experts.") => (sub_layer(name), 0),
                Grain::SubLayer => (sub_layer(name), LEARN_BYTES),
                Grain::Block if learn.beside.scale || learn.beside.compensate => {
                    (parent(sub_layer(name)), LEARN_BYTES + BESIDE_BYTES)
                }
                Grain::Block => (parent(sub_layer(name)), LEARN_BYTES),
                Grain::Model => ("", 0),
            };
            if learn.grain == Grain::Model {
                let tokens = u128::from(learn.steps(spec.abq.bits, windows as usize))
                    * u128::from(learn.batch())
                    * u128::from(window);
                // The dense model, too.
                products += (LEARN_PRODUCTS + 1) * tokens * u128::from(weights);
                continue;
            }
            let more: &mut u64 = learned.entry(of).or_default();
            *more = more.saturating_add(weights.saturating_mul(bytes));
            let steps = u128::from(learn.steps(spec.abq.bits, windows as usize)) * u128::from(weights);
            products += match bytes {
                0 => steps * u128::from(cols) / LEARN_TRIES,
                _ => LEARN_PRODUCTS * steps * u128::from(window),
            };
        }
        both |= spec.learn.is_some_and(|learn| learn.grain != Grain::Model)
            || spec.rung == Rung::Gptq && makes_up(tokens, cols);
        if spec.rung == Rung::Gptq {
            products += u128::from(weights) * u128::from(cols);
            if inputs.insert((sub_layer(name), cols)) {
                products += tokens * u128::from(cols) * u128::from(cols) / 2 + u128::from(cols).pow(3) / 3;
            }
        }
    }
    let hidden =
        view.config().and_then(|c| c.get("hidden_size")).and_then(serde_json::Value::as_u64).unwrap_or(0);
    // What is learned, or makes up for what was lost, goes by the original's streams as well.
    let whole = specs.values().filter_map(|spec| spec.learn).any(|learn| learn.grain == Grain::Block);
    let kinds = match (whole, both) {
        (true, _) => 4,
        (false, true) => 2,
        (false, false) => 1,
    };
    let bytes = |kinds: u128| u64::try_from(kinds * tokens * u128::from(hidden) * 4).unwrap_or(u64::MAX);
    // Two kinds at most are kept, all of them may be in work.
    found.stream_bytes = bytes(2 * kinds.min(2) + kinds);
    let streams = bytes(kinds).min(MEMORY);
    found.million_products = u64::try_from(products / 1_000_000).unwrap_or(u64::MAX);
    found.bits_per_weight = found.bytes as f64 * 8.0 / found.weights.max(1) as f64;
    let learning = learned.values().max().copied().unwrap_or(0);
    let work = largest.saturating_mul(WORK_BYTES).max(feedback_bytes(view, specs)?).max(learning);
    let folded = if with.is_empty() { 0 } else { folded_bytes(view, specs)? };
    found.memory_bytes = BASE_BYTES.saturating_add(work).saturating_add(streams).saturating_add(folded);
    if whole::is_wanted(specs) {
        // One after the other.
        found.memory_bytes = found.memory_bytes.max(whole_bytes(view, specs, window)?);
        found.stream_bytes = found.stream_bytes.max(found.weights.saturating_mul(STATE_BYTES));
    }
    Ok(found)
}

/// What learning the whole model takes in memory, by windows of so many tokens: everything that is learned at once, the head of both
/// models, what a window keeps for the way back, some logits.
pub(crate) fn whole_bytes(view: &Checkpoint, specs: &BTreeMap<String, Spec>, window: u64) -> Result<u64> {
    let config = |name: &str| {
        let value = view.config().and_then(|c| c.get(name)).and_then(serde_json::Value::as_u64);
        value.unwrap_or(0)
    };
    let (hidden, vocab, layers) = (config("hidden_size"), config("vocab_size"), config("num_hidden_layers"));
    let mut bytes = BASE_BYTES;
    let names = view.tensors().keys().map(String::as_str);
    for name in block_linears(view.config().and_then(|c| c.model_type()), names).into_iter().flatten() {
        let (rows, cols) = abq::matrix(&view.tensor(&name)?.shape).unwrap_or_default();
        let weights = rows.saturating_mul(cols);
        let more = match specs.get(&name).filter(|spec| spec.whole().is_some()) {
            Some(spec) => {
                let groups = rows.saturating_mul(spec.abq.groups(cols as usize) as u64);
                weights.saturating_mul(WHOLE_BYTES).saturating_add(groups.saturating_mul(GRID_BYTES))
            }
            None => weights.saturating_mul(STILL_BYTES),
        };
        bytes = bytes.saturating_add(more);
    }
    let kept = window.saturating_mul(4 * KEPT * hidden).saturating_mul(layers);
    let more = [Head::bytes(vocab, hidden), kept, MOST_LOGIT_BYTES as u64];
    Ok(more.into_iter().fold(bytes, u64::saturating_add))
}

/// Refuses to learn the whole model in less memory than it takes.
///
/// # Errors
/// [`Error::Limit`], with both, and what takes less.
pub(crate) fn check_whole_fits(
    view: &Checkpoint,
    specs: &BTreeMap<String, Spec>,
    window: usize,
    memory: Option<u64>,
) -> Result<()> {
    let Some(allowed) = memory.filter(|_| whole::is_wanted(specs)) else { return Ok(()) };
    let needed = whole_bytes(view, specs, window as u64)?;
    if needed <= allowed {
        return Ok(());
    }
    Err(Error::Limit(format!(
        "learn=model has all that it learns in memory: {} MiB at {WHOLE_BYTES} bytes a weight, the head in single precision and a window of \
         {window} tokens; --max-memory allows {} MiB: learn=block has a block at a time",
        needed.div_ceil(1 << 20),
        allowed >> 20
    )))
}

/// What a transformed block takes in single precision, and as much again for the original's.
fn folded_bytes(view: &Checkpoint, specs: &BTreeMap<String, Spec>) -> Result<u64> {
    let mut most = 0u64;
    let names = specs.keys().map(String::as_str);
    for block in block_linears(view.config().and_then(|c| c.model_type()), names) {
        let mut weights = 0u64;
        for name in &block {
            let (rows, cols) = abq::matrix(&view.tensor(name)?.shape).unwrap_or_default();
            weights = weights.saturating_add(rows * cols);
        }
        most = most.max(weights);
    }
    Ok(most.saturating_mul(8))
}

/// The most that error feedback takes over a block.
fn feedback_bytes(view: &Checkpoint, specs: &BTreeMap<String, Spec>) -> Result<u64> {
    let fed = specs.iter().filter(|(_, spec)| spec.rung == Rung::Gptq).map(|(name, _)| name.as_str());
    let mut peak = 0;
    for block in block_linears(view.config().and_then(|c| c.model_type()), fed) {
        let mut inputs: BTreeMap<(&str, u64), InputShape> = BTreeMap::new();
        for name in &block {
            let (rows, cols) = abq::matrix(&view.tensor(name)?.shape).unwrap_or_default();
            let input = inputs.entry((sub_layer(name), cols));
            input.or_insert(InputShape { features: cols, rows: Vec::new() }).rows.push(rows);
        }
        peak = peak.max(block_peak_bytes(&inputs.into_values().collect::<Vec<_>>()));
    }
    Ok(peak)
}

/// Linears of a sub-layer that are as wide mostly multiply the same.
fn sub_layer(name: &str) -> &str {
    name.rsplitn(3, '.').nth(2).unwrap_or_default()
}

/// The block of a sub-layer.
fn parent(sub_layer: &str) -> &str {
    sub_layer.rsplit_once('.').map_or("", |(parent, _)| parent)
}
