//! A ranking as a picture: score by layer, attention and MLP side by side.

use llmpress_formats::{Error, Result};
use llmpress_plot::{Bar, Bars};

use crate::ranking::{Kind, Ranking, Scored};

/// Layers that are drawn: more than any model has.
const MAX_LAYERS: usize = 1 << 12;

/// An SVG: a pair of bars a layer (or one for whole layers). What the first `removed` removals take is filled and the
/// rest outlined; with none of them everything is filled.
///
/// # Errors
/// It cannot be drawn.
pub fn svg(ranking: &Ranking, removed: usize) -> Result<String> {
    let taken = &ranking.removed[..removed.min(ranking.removed.len())];
    let is_taken = |s: &Scored| {
        taken.is_empty()
            || taken.iter().any(|t| t.layer == s.layer && (t.kind == s.kind || t.kind == Kind::Block))
    };
    // Baselines have no scores: their order is shown.
    let ordered = ranking.scores.is_empty();
    let place = |(i, s): (usize, &Scored)| Scored { score: (i + 1) as f64, ..*s };
    let shown: Vec<Scored> = match ordered {
        true => ranking.removed.iter().enumerate().map(place).collect(),
        false => ranking.scores.clone(),
    };
    let kinds: Vec<Kind> = [Kind::Attention, Kind::Mlp, Kind::Block]
        .into_iter()
        .filter(|kind| shown.iter().any(|s| s.kind == *kind))
        .collect();
    let bars = shown.iter().filter_map(|s| {
        Some(Bar {
            category: s.layer,
            series: kinds.iter().position(|kind| *kind == s.kind)?,
            value: s.score,
            filled: is_taken(s),
        })
    });
    let name = |kind: &Kind| match kind {
        Kind::Attention => "attention",
        Kind::Mlp => "MLP",
        Kind::Block => "whole layer",
    };
    let of = match taken.len() {
        0 => String::new(),
        count => format!(": {count} of {} removed (filled)", shown.len()),
    };
    let bars = Bars {
        title: format!("{}{of}", ranking.method),
        x: "layer".to_owned(),
        y: axis(&ranking.method, ordered).to_owned(),
        categories: (0..ranking.layers.min(MAX_LAYERS)).map(|layer| layer.to_string()).collect(),
        series: kinds.iter().map(|kind| name(kind).to_owned()).collect(),
        bars: bars.collect(),
    };
    bars.svg().map_err(|e| Error::Invalid(e.to_string()))
}

/// What scores are.
fn axis(method: &str, ordered: bool) -> &'static str {
    let distance = |name: &str| method.split(',').any(|option| option == format!("distance={name}"));
    match () {
        () if ordered => "place in the order of removal",
        () if method.starts_with("drop:") => "mean cosine of the residual",
        () if distance("js") => "Jensen-Shannon divergence, nats",
        () if distance("angular") => "mean angle of the logits, radians",
        () if distance("euclidean") => "distance of the logits",
        () => "score",
    }
}
