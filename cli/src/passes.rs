//! Passes, for people.

use std::collections::BTreeSet;

use llmpress_formats::Removal;
use llmpress_pipeline::{CalibrationRecord, Pass, PassForecast, PlannedPass, QuantiseForecast};

use crate::report::bytes;

/// What a pass that is settled does.
pub(crate) fn describe(pass: &Pass) -> String {
    match pass {
        Pass::Remove(removal) => describe_removal(removal),
        Pass::Prune(_) | Pass::Sparsify(_) | Pass::Train(_) | Pass::Quantise(_) => pass.to_string(),
        Pass::Sparsified(done) => {
            describe_finished("made 2:4", &done.to.to_string(), done.calibration.as_ref())
        }
        Pass::Trained(done) => describe_finished("trained", &done.to.to_string(), done.text.as_ref()),
        Pass::Quantised(done) => {
            describe_finished("quantised", &done.to.to_string(), done.calibration.as_ref())
        }
    }
}

fn describe_finished(what: &str, to: &str, text: Option<&CalibrationRecord>) -> String {
    let text = text.map(|text| format!(" by {} windows of {} tokens", text.windows, text.window));
    format!("{what}: {to}{}", text.unwrap_or_default())
}

fn describe_removal(removal: &Removal) -> String {
    let layers =
        |layers: &BTreeSet<usize>| layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    if removal.renumbers() {
        return format!("pruned: layers {}", layers(&removal.attention));
    }
    let mut parts = Vec::new();
    if !removal.attention.is_empty() {
        parts.push(format!("attention of layers {}", layers(&removal.attention)));
    }
    if !removal.mlp.is_empty() {
        parts.push(format!("MLP of layers {}", layers(&removal.mlp)));
    }
    let how = if removal.portable { " (made zero)" } else { "" };
    format!("pruned{how}: {}", parts.join(", "))
}

/// What a pass that is still to be worked out will do and take.
pub(crate) fn forecast(pass: &PlannedPass) -> String {
    match &pass.forecast {
        PassForecast::Prune(f) => forecast_pruning(&pass.pass, f),
        PassForecast::Finish(f) => forecast_finishing(&pass.pass, f),
    }
}

fn forecast_finishing(pass: &Pass, f: &QuantiseForecast) -> String {
    let by = match f.windows {
        0 => "by no text".to_owned(),
        windows => format!(
            "by {windows} windows of {} tokens, {:.1e} multiplications",
            f.window,
            f.million_products as f64 * 1e6
        ),
    };
    format!(
        "{pass}: {} tensors, {} weights, {} -> {}, {:.3} bits a weight\n  {by}; memory: about {} beside the mapped weights; \
         disk for finished blocks and streams: about {}\n",
        f.tensors,
        f.weights,
        bytes(f.source_bytes),
        bytes(f.bytes),
        f.bits_per_weight,
        bytes(f.memory_bytes),
        bytes(f.bytes.saturating_add(f.stream_bytes)),
    )
}

fn forecast_pruning(pass: &Pass, f: &llmpress_prune::Forecast) -> String {
    let size = match (f.dropped_bytes_least, f.dropped_bytes_most) {
        (0, 0) => "made zero".to_owned(),
        (least, most) if least == most => bytes(least),
        (least, most) => format!("{} to {}", bytes(least), bytes(most)),
    };
    let what = format!("{}: {} of {} {} go, {size}", pass, f.removed, f.of, f.what);
    if f.windows == 0 {
        return format!("{what}; which ones, the passes before decide\n");
    }
    format!(
        "{what}; which ones, a text decides\n  ranking: {} forward passes over {} windows of {} tokens, {:.1e} \
         multiplications; memory: about {} beside the mapped weights\n",
        f.forward_passes,
        f.windows,
        f.window,
        f.million_products as f64 * 1e6,
        bytes(f.memory_bytes),
    )
}
