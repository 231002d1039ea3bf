//! A ranking as a picture: score by layer, attention and MLP side by side.

use std::fmt::Write;

use crate::ranking::{Kind, Ranking, Scored};

const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const HEIGHT: f64 = 260.0;
const LAYER: f64 = 26.0;

/// An SVG: a pair of bars a layer (or one for whole layers). What the first `removed` removals take is filled, the rest is
/// outlined.
pub fn svg(ranking: &Ranking, removed: usize) -> String {
    let layers = ranking.layers.max(1);
    let width = LEFT + LAYER * layers as f64 + 30.0;
    let taken = &ranking.removed[..removed.min(ranking.removed.len())];
    let is_taken =
        |s: &Scored| taken.iter().any(|t| t.layer == s.layer && (t.kind == s.kind || t.kind == Kind::Block));
    // Baselines have no scores: what goes is shown all the same.
    let shown: Vec<Scored> = match ranking.scores.is_empty() {
        true => ranking.removed.iter().map(|s| Scored { score: 1.0, ..*s }).collect(),
        false => ranking.scores.clone(),
    };
    let finite = || shown.iter().map(|s| s.score).filter(|s| s.is_finite());
    let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
    // Similarities crowd below 1: the axis begins near the lowest.
    let floor = if low > 0.5 * high && high > low { low - 0.1 * (high - low) } else { low.min(0.0) };
    let span = if high > floor { high - floor } else { 1.0 };
    let y = |score: f64| TOP + HEIGHT * (1.0 - ((score - floor) / span).clamp(0.0, 1.0));
    let mut out = String::new();
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{:.0}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"20\" \
         font-size=\"13\">{}: score by layer, {} removed (filled)</text>\n",
        TOP + HEIGHT + 50.0,
        escape(&ranking.method),
        taken.len(),
    );
    for (i, (name, colour)) in
        [("attention", "#1f77b4"), ("MLP", "#ff7f0e"), ("layer", "#2ca02c")].iter().enumerate()
    {
        let kind = [Kind::Attention, Kind::Mlp, Kind::Block][i];
        if shown.iter().any(|s| s.kind == kind) {
            let x = LEFT + 90.0 * i as f64;
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"29\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"38\">{name}</text>",
                x + 14.0
            );
        }
    }
    for step in 0..=4 {
        let score = floor + span * f64::from(step) / 4.0;
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/><text x=\"{:.0}\" y=\"{:.1}\" \
             text-anchor=\"end\">{score:.4}</text>",
            width - 20.0,
            LEFT - 6.0,
            y(score) + 4.0,
            y = y(score),
        );
    }
    for s in &shown {
        let (offset, bar, colour) = match s.kind {
            Kind::Attention => (2.0, 10.0, "#1f77b4"),
            Kind::Mlp => (13.0, 10.0, "#ff7f0e"),
            Kind::Block => (2.0, 21.0, "#2ca02c"),
        };
        let fill = if is_taken(s) { colour } else { "white" };
        let x = LEFT + LAYER * s.layer as f64 + offset;
        let _ = writeln!(
            out,
            "<rect x=\"{x:.0}\" y=\"{:.1}\" width=\"{bar}\" height=\"{:.1}\" fill=\"{fill}\" stroke=\"{colour}\">\
             <title>layer {} {:?}: {}</title></rect>",
            y(s.score),
            (TOP + HEIGHT - y(s.score)).max(1.0),
            s.layer,
            s.kind,
            s.score
        );
    }
    for layer in 0..layers {
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{layer}</text>",
            LEFT + LAYER * (layer as f64 + 0.5),
            TOP + HEIGHT + 16.0
        );
    }
    out.push_str("</svg>\n");
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
