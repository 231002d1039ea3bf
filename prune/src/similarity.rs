//! How much each sub-layer turns the residual stream (LLM-Drop, section 3).
//!
//! ```text
//! h --> h + attention(norm(h)) --> h' + mlp(norm(h'))        cos of before and after, mean over tokens
//! ```

use llmpress_calibrate::Calibration;
use llmpress_formats::Result;
use llmpress_model::{Model, Observer, Panels, Skips, SubLayer};

use crate::ranking::Kind;
use crate::{Scored, Target};

/// Mean cosines of the residual stream before and after each sub-layer and layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Similarities {
    scores: Vec<Scored>,
}

impl Similarities {
    /// Those of a target's candidates, by layer.
    pub fn of(&self, target: Target) -> Vec<Scored> {
        let wanted = |kind| match target {
            Target::Attention => kind == Kind::Attention,
            Target::Mlp => kind == Kind::Mlp,
            Target::Joint => kind != Kind::Block,
            Target::Block => kind == Kind::Block,
        };
        self.scores.iter().filter(|s| wanted(s.kind)).copied().collect()
    }
}

/// Measures them on a model without `skips`, which have no score. Cosines are of F32 activations, added up in F64 over the
/// tokens in order. `progress` is told each window that was read.
///
/// # Errors
/// Weights that cannot be read.
pub fn similarities(
    model: &Model,
    calibration: &Calibration,
    skips: &Skips,
    progress: &mut dyn FnMut(),
) -> Result<Similarities> {
    let layers = model.config().layers.len();
    let mut cosines =
        Cosines { sums: vec![[0.0; 3]; layers], before: Panels::default(), before_layer: Panels::default() };
    let mut cache = model.cache(calibration.length());
    for window in calibration.windows() {
        cache.clear();
        let mut h = model.embed(window)?;
        model.run_layers(0..layers, &mut h, &mut cache, skips, &mut cosines)?;
        progress();
    }
    let tokens = calibration.tokens() as f64;
    let present = model.sub_layers();
    let has = |site| present.contains(&site) && !skips.contains(&site);
    let mut scores = Vec::new();
    for (layer, sums) in cosines.sums.iter().enumerate() {
        let (attention, mlp) = (has(SubLayer::Attention(layer)), has(SubLayer::Mlp(layer)));
        let kinds = [(Kind::Attention, attention), (Kind::Mlp, mlp), (Kind::Block, attention && mlp)];
        for ((kind, _), sum) in kinds.into_iter().zip(sums).filter(|((_, there), _)| *there) {
            scores.push(Scored { layer, kind, score: sum / tokens });
        }
    }
    Ok(Similarities { scores })
}

struct Cosines {
    /// Of attention, MLP and the layer as a whole.
    sums: Vec<[f64; 3]>,
    before: Panels,
    before_layer: Panels,
}

impl Observer for Cosines {
    fn before(&mut self, site: SubLayer, residual: &Panels) {
        copy(residual, &mut self.before);
        if let SubLayer::Attention(_) = site {
            copy(residual, &mut self.before_layer);
        }
    }

    fn after(&mut self, site: SubLayer, residual: &Panels) {
        match site {
            SubLayer::Attention(layer) => self.sums[layer][0] += cosine_sum(&self.before, residual),
            SubLayer::Mlp(layer) => {
                self.sums[layer][1] += cosine_sum(&self.before, residual);
                self.sums[layer][2] += cosine_sum(&self.before_layer, residual);
            }
        }
    }
}

fn copy(from: &Panels, to: &mut Panels) {
    to.resize(from.features(), from.tokens());
    to.data_mut().copy_from_slice(from.data());
}

/// The sum over tokens of the cosine of their columns.
fn cosine_sum(a: &Panels, b: &Panels) -> f64 {
    let mut sum = 0.0;
    for panel in 0..a.count() {
        let width = a.width(panel);
        let mut of_token = vec![[0f64; 3]; width];
        let rows = a.panel(panel).chunks_exact(width).zip(b.panel(panel).chunks_exact(width));
        for (a, b) in rows {
            for ((sums, a), b) in of_token.iter_mut().zip(a).zip(b) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                sums[0] += a * b;
                sums[1] += a * a;
                sums[2] += b * b;
            }
        }
        for [product, a, b] in of_token {
            // A state of zero is as it was.
            sum += if a * b > 0.0 { product / (a * b).sqrt() } else { 1.0 };
        }
    }
    sum
}
