//! What training will leave and take, from headers alone.

use std::collections::BTreeMap;

use llmpress_formats::encoding::sparse24::matrix;
use llmpress_formats::{Checkpoint, Tensor};
use llmpress_learn::{Head, MOST_LOGIT_BYTES};
use llmpress_sparsify::{Rule, Sparsifier};

use super::Ast;
use crate::{Method, QuantiseForecast, Result, sparsify};

/// What the process takes besides weights and activations: code, tables, buffers of the threads.
const BASE_BYTES: u64 = 64 << 20;
/// Bytes of a weight in training: all of W, both means, what products see, that turned, and its derivative.
const WEIGHT_BYTES: u64 = 24;
/// Products with each weight that a token takes: teacher, student, and back to weights and inputs.
const PRODUCTS: u128 = 4;
/// Values of a token that each layer keeps for the way back, in sizes of its inputs.
const KEPT: u64 = 24;

/// Bytes of a tensor after training, stored by a method. `sums`: whether it has some beside by then.
pub(crate) fn expected_bytes(tensor: &Tensor, sums: bool, to: Method) -> u64 {
    let how = Sparsifier { slorb: sums, ..Sparsifier::new(Rule::Magnitude) };
    sparsify::stored_bytes(tensor, &how, to)
}

/// What it comes to for tensors that are 2:4 by then; of each whether sums are beside it.
pub(crate) fn forecast(
    view: &Checkpoint,
    tensors: &BTreeMap<String, bool>,
    settings: &Ast,
) -> Result<QuantiseForecast> {
    let config = |name: &str| {
        let value = view.config().and_then(|c| c.get(name)).and_then(serde_json::Value::as_u64);
        value.unwrap_or(0)
    };
    let (hidden, vocab, layers) = (config("hidden_size"), config("vocab_size"), config("num_hidden_layers"));
    let steps = u64::from(settings.steps);
    let mut found = QuantiseForecast {
        tensors: tensors.len() as u64,
        weights: 0,
        source_bytes: 0,
        bytes: 0,
        bits_per_weight: 0.0,
        windows: steps.saturating_mul(u64::from(settings.batch)),
        window: u64::from(settings.window),
        million_products: 0,
        stream_bytes: 0,
        memory_bytes: BASE_BYTES,
    };
    for (name, sums) in tensors {
        let tensor = view.tensor(name)?;
        let (rows, cols) = matrix(&tensor.shape).unwrap_or_default();
        found.weights = found.weights.saturating_add(rows.saturating_mul(cols));
        found.source_bytes = found.source_bytes.saturating_add(tensor.bytes);
        found.bytes =
            found.bytes.saturating_add(expected_bytes(tensor, *sums || settings.slorb, Method::Sparse24));
    }
    let tokens = u128::from(steps) * settings.tokens() as u128;
    // The head: of both models, and back to what it multiplies.
    let each = PRODUCTS * u128::from(found.weights) + 3 * u128::from(hidden) * u128::from(vocab);
    found.million_products = u64::try_from(tokens * each / 1_000_000).unwrap_or(u64::MAX);
    found.bits_per_weight = found.bytes as f64 * 8.0 / found.weights.max(1) as f64;
    // A state, and the next one beside it.
    found.stream_bytes = found.weights.saturating_mul(2 * 12 + 1);
    let kept = u64::from(settings.window).saturating_mul(4 * KEPT * hidden).saturating_mul(layers);
    for more in [
        found.weights.saturating_mul(WEIGHT_BYTES),
        Head::bytes(vocab, hidden),
        kept,
        MOST_LOGIT_BYTES as u64,
    ] {
        found.memory_bytes = found.memory_bytes.saturating_add(more);
    }
    Ok(found)
}
