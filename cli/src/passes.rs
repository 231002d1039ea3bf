//! Passes, for people.

use std::collections::BTreeSet;

use llmpress_formats::Removal;
use llmpress_pipeline::{Pass, PlannedPass};

use crate::report::bytes;

/// What a pass that is settled does.
pub(crate) fn describe(pass: &Pass) -> String {
    match pass {
        Pass::Remove(removal) => describe_removal(removal),
        Pass::Prune(pass) => pass.to_string(),
    }
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
    let f = &pass.forecast;
    let size = match (f.dropped_bytes_least, f.dropped_bytes_most) {
        (0, 0) => "made zero".to_owned(),
        (least, most) if least == most => bytes(least),
        (least, most) => format!("{} to {}", bytes(least), bytes(most)),
    };
    let what = format!("{}: {} of {} {} go, {size}", pass.pass, f.removed, f.of, f.what);
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
