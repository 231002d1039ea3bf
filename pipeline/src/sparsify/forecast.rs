//! What a pass that makes matrices 2:4 will leave and take, from headers alone.

use std::collections::{BTreeMap, BTreeSet};

use llmpress_calibrate::Cut;
use llmpress_formats::encoding::sparse24::matrix;
use llmpress_formats::{Checkpoint, Tensor, block_linears};
use llmpress_sparsify::{GROUP, InputShape, Rule, Sparsifier, block_peak_bytes};

use super::partly::Choices;
use super::run::MEMORY;
use crate::measuring;
use crate::{Method, QuantiseForecast, Result};

/// What the process takes besides weights and activations: code, tables, buffers of the threads.
const BASE_BYTES: u64 = 64 << 20;
/// Products with each weight that a token takes in a step of reconstruction: forward, and back to weights and inputs.
const LEARN_PRODUCTS: u128 = 3;

/// Bytes of a tensor that is made 2:4 and then stored by a method.
pub(crate) fn stored_bytes(tensor: &Tensor, how: &Sparsifier, to: Method) -> u64 {
    let (rows, cols) = matrix(&tensor.shape).unwrap_or_default();
    let encoded = matches!(to, Method::Fixed12 | Method::Sparse24Fixed12);
    let method = if encoded { Method::Sparse24Fixed12 } else { Method::Sparse24 };
    let sums = if how.slorb { rows * cols.div_ceil(GROUP as u64) } else { 0 };
    let sums = sums.saturating_mul(u64::from(tensor.dtype.bits())) / 8;
    method.room().expected_bytes(Some(tensor), tensor.bytes).saturating_add(sums)
}

/// What it comes to on a view, by windows cut so.
pub(crate) fn forecast(
    view: &Checkpoint,
    tensors: &BTreeSet<String>,
    how: &Sparsifier,
    choices: Option<&Choices>,
    cut: Cut,
) -> Result<QuantiseForecast> {
    let (windows, window) = if how.needs_text() { (cut.windows as u64, cut.length as u64) } else { (0, 0) };
    let tokens = u128::from(windows) * u128::from(window);
    let mut found = QuantiseForecast {
        tensors: tensors.len() as u64,
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
    let (mut products, mut products_of_order) = (0u128, 0u128);
    let mut squares: BTreeSet<(&str, u64)> = BTreeSet::new();
    for name in tensors {
        let tensor = view.tensor(name)?;
        let (rows, cols) = matrix(&tensor.shape).unwrap_or_default();
        let (weights, columns) = (rows.saturating_mul(cols), u128::from(cols));
        found.weights = found.weights.saturating_add(weights);
        found.source_bytes = found.source_bytes.saturating_add(tensor.bytes);
        let all = stored_bytes(tensor, how, Method::Sparse24);
        let some = choices.and_then(|choices| choices.expected_bytes(name, tensor, all, tensor.bytes));
        found.bytes = found.bytes.saturating_add(some.unwrap_or(all));
        // Once for what they multiply, once for what comes out.
        let tokens = if how.finds_by_text() { tokens } else { 0 };
        products += 2 * tokens * u128::from(weights);
        if let Some(reconstruct) = how.reconstruct {
            products +=
                LEARN_PRODUCTS * u128::from(reconstruct.steps()) * u128::from(window) * u128::from(weights);
        }
        if how.rule == Rule::SparseGpt {
            products += u128::from(weights) * columns;
            if squares.insert((sub_layer(name), cols)) {
                products += tokens * columns * columns / 2 + columns.pow(3) / 3;
            }
        }
    }
    if let Some(choices) = choices {
        products += measuring::products(&choices.weights(view)?, choices.measured_forms(), cut);
        found.memory_bytes = found.memory_bytes.saturating_add(measuring::logits_bytes(view, cut, MEMORY)?);
    }
    let hidden =
        view.config().and_then(|c| c.get("hidden_size")).and_then(serde_json::Value::as_u64).unwrap_or(0);
    // The original's streams go along where something makes up for what was lost.
    let kinds = if how.reconstruct.is_some() || how.rule == Rule::SparseGpt { 2 } else { 1 };
    let bytes = |kinds: u128| u64::try_from(kinds * tokens * u128::from(hidden) * 4).unwrap_or(u64::MAX);
    // Of the last two blocks for a moment, and those in work.
    found.stream_bytes = bytes(3 * kinds);
    found.bits_per_weight = found.bytes as f64 * 8.0 / found.weights.max(1) as f64;
    let streams = bytes(kinds).min(MEMORY);
    let mut work = peak_bytes(view, tensors, how)?;
    if how.permute {
        if how.rule != Rule::Magnitude {
            products_of_order = tokens * u128::from(found.weights);
        }
        work = work.max(ordering_bytes(view, tensors)?).saturating_add(moved_bytes(view, tensors)?);
    }
    found.million_products = u64::try_from((products + products_of_order) / 1_000_000).unwrap_or(u64::MAX);
    found.memory_bytes = found.memory_bytes.saturating_add(work).saturating_add(streams);
    Ok(found)
}

/// What finding an order takes: a matrix in single precision, and what its weights are worth.
fn ordering_bytes(view: &Checkpoint, tensors: &BTreeSet<String>) -> Result<u64> {
    let weights = tensors
        .iter()
        .map(|name| Ok(matrix(&view.tensor(name)?.shape).map_or(0, |(rows, cols)| rows * cols)));
    Ok(weights.collect::<Result<Vec<u64>>>()?.into_iter().max().unwrap_or(0).saturating_mul(8))
}

/// Matrices whose rows are in another order, of which as many as threads read at a time are made as a whole, and one more.
fn moved_bytes(view: &Checkpoint, tensors: &BTreeSet<String>) -> Result<u64> {
    let bytes = tensors.iter().map(|name| Ok(view.tensor(name)?.bytes)).collect::<Result<Vec<u64>>>()?;
    let held = rayon::current_num_threads() as u64 + 1;
    Ok(bytes.into_iter().max().unwrap_or(0).saturating_mul(held))
}

/// The most that a block takes.
fn peak_bytes(view: &Checkpoint, tensors: &BTreeSet<String>, how: &Sparsifier) -> Result<u64> {
    let names = tensors.iter().map(String::as_str);
    let mut peak = 0;
    for block in block_linears(view.config().and_then(|c| c.model_type()), names) {
        let mut inputs: BTreeMap<(&str, u64), InputShape> = BTreeMap::new();
        for name in &block {
            let (rows, cols) = matrix(&view.tensor(name)?.shape).unwrap_or_default();
            let input = inputs.entry((sub_layer(name), cols));
            input.or_insert(InputShape { features: cols, rows: Vec::new() }).rows.push(rows);
        }
        let inputs: Vec<_> = inputs.into_values().collect();
        peak = peak.max(block_peak_bytes(&inputs, how.reconstruct.is_some()));
    }
    Ok(peak)
}

/// Linears of a sub-layer that are as wide mostly multiply the same.
fn sub_layer(name: &str) -> &str {
    name.rsplitn(3, '.').nth(2).unwrap_or_default()
}
