//! Removes whole sub-layers (attention or MLP, each with its norm) from a decoder.
//!
//! ```text
//! method + calibration tokens --> Ranking: what goes first, with scores --> Removal: which tensors go
//! ```
//!
//! - LLM-Drop (He et al., "What Matters in Transformers? Not All Attention is Needed"): the sub-layers that change the
//!   residual stream least.
//! - FinerCut (Zhang et al., "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models"): greedily the one whose removal
//!   changes the model's output least.
//! - Random and last: baselines.

mod finercut;
mod forecast;
mod method;
mod picture;
mod ranking;
mod run;
mod similarity;

pub use finercut::{FinerCut, Search, finercut};
pub use forecast::Forecast;
pub use llmpress_formats::{Error, Removal, Result};
pub use method::{Amount, Method, Pass, Target};
pub use picture::svg;
pub use ranking::{Kind, PRUNING_FILE, Ranking, Scored};
pub use run::{Counted, Watch};
pub use similarity::{Similarities, similarities};

use llmpress_calibrate::Calibration;
pub use llmpress_calibrate::{Distance, DistanceKind, distances};
use llmpress_model::{Model, SubLayer};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Ranks sub-layers by LLM-Drop: all of them, or, where similarities are measured again after each removal, as many
/// as are asked for. `progress` is told each window that was read.
///
/// # Errors
/// Weights that cannot be read.
pub fn drop_ranking(
    model: &Model,
    target: Target,
    iterative: Option<usize>,
    calibration: &Calibration,
    progress: &mut dyn FnMut(),
) -> Result<Ranking> {
    let first = similarities(model, calibration, &Default::default(), progress)?;
    let scores = first.of(target);
    let mut ranking = Ranking::calibrated(model, format!("drop:{}", target.name()), calibration)?;
    let mut order = scores.clone();
    sort(&mut order);
    if let Some(count) = iterative {
        ranking.method.push_str(",iterative");
        let mut skips = llmpress_model::Skips::new();
        let mut removed: Vec<Scored> = Vec::new();
        let mut next = order.first().copied();
        while let Some(best) = next.filter(|_| removed.len() < count) {
            removed.push(best);
            skips.extend(best.sub_layers());
            next = None;
            if removed.len() < count {
                let again = similarities(model, calibration, &skips, progress)?.of(target);
                let mut left: Vec<Scored> =
                    again.into_iter().filter(|s| !removed.iter().any(|r| r.same_place(s))).collect();
                sort(&mut left);
                next = left.first().copied();
            }
        }
        order = removed;
    }
    ranking.scores = scores;
    ranking.removed = order;
    Ok(ranking)
}

/// The most similar first; of equals the lower layer, attention before MLP.
fn sort(scores: &mut [Scored]) {
    scores.sort_by(|a, b| b.score.total_cmp(&a.score).then((a.layer, a.kind).cmp(&(b.layer, b.kind))));
}

/// Every sub-layer in an order drawn by `seed`.
pub fn random_ranking(model: &Model, seed: u64) -> Ranking {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut order = model.sub_layers();
    for i in (1..order.len()).rev() {
        // The bias of a remainder over 64 bits is far below what anyone could see.
        order.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
    let mut ranking = Ranking::baseline(model, format!("drop:random,seed={seed}"));
    ranking.removed = order.into_iter().map(|site| Scored::new(site, 0.0)).collect();
    ranking
}

/// Every sub-layer, the last first.
pub fn last_ranking(model: &Model) -> Ranking {
    let mut ranking = Ranking::baseline(model, "drop:last".to_owned());
    ranking.removed = model.sub_layers().into_iter().rev().map(|site| Scored::new(site, 0.0)).collect();
    ranking
}

/// A sub-layer's layer.
pub(crate) fn layer_of(site: SubLayer) -> usize {
    match site {
        SubLayer::Attention(layer) | SubLayer::Mlp(layer) => layer,
    }
}
