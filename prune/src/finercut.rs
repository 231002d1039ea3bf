//! FinerCut: greedily remove the sub-layer whose loss changes the output least.
//!
//! ```text
//! each round, each window:   the residual before every sub-layer of what is left, once
//!                            each candidate from its own sub-layer on --> logits --> distance to the whole model's
//! ```
//!
//! What comes before a candidate is the same with and without it, so it is computed once: half of the work. The bits of a
//! forward pass do not depend on where it began, so the search is that of whole passes.

use llmpress_calibrate::Calibration;
use llmpress_formats::{Error, Result};
use llmpress_model::{Model, Observer, Panels, Skips, SubLayer};

use crate::{Distance, DistanceKind, Ranking, Scored, distances, layer_of};

/// How candidates are evaluated. The result is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Search {
    /// From the candidate's sub-layer on.
    #[default]
    CachedPrefixes,
    /// Whole forward passes.
    Plain,
}

/// What is searched for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FinerCut {
    /// The distance.
    pub distance: DistanceKind,
    /// The share of layers, from the first on, that is spared until the others are used up.
    pub protect: f64,
    /// Sub-layers to remove.
    pub count: usize,
    /// How.
    pub search: Search,
}

impl FinerCut {
    /// Candidates of each round of a model, of which `done` are over: what the whole search evaluates on each window.
    pub fn candidates(&self, model: &Model) -> Vec<usize> {
        let all = model.sub_layers();
        let open = all.iter().filter(|site| !self.protected(model, **site)).count();
        let round = |removed: usize| if removed < open { open - removed } else { all.len() - removed };
        (0..self.count.min(all.len())).map(round).collect()
    }

    fn protected(&self, model: &Model, site: SubLayer) -> bool {
        layer_of(site) < (self.protect * model.config().layers.len() as f64).floor() as usize
    }

    fn name(&self) -> String {
        format!("finercut,distance={},protect={}", self.distance.name(), self.protect)
    }
}

/// Searches. `found` is a ranking of an earlier run to go on from; `progress` is told each candidate evaluated on a window;
/// `save` is given the ranking after each round.
///
/// # Errors
/// A ranking of another model, calibration or method; more removals than there are sub-layers; weights that cannot be read;
/// those of `save`.
pub fn finercut(
    model: &Model,
    options: &FinerCut,
    calibration: &Calibration,
    found: Option<Ranking>,
    progress: &mut dyn FnMut(),
    save: &mut dyn FnMut(&Ranking) -> Result<()>,
) -> Result<Ranking> {
    let all = model.sub_layers();
    if options.count > all.len() {
        return Err(Error::Invalid(format!(
            "{} sub-layers cannot be removed: there are {}",
            options.count,
            all.len()
        )));
    }
    let mut ranking = Ranking::calibrated(model, options.name(), calibration)?;
    if let Some(found) = found {
        if (&found.method, &found.fingerprint) != (&ranking.method, &ranking.fingerprint) {
            return Err(Error::Invalid(
                "the ranking to go on from is of another model, calibration or method: leave out --resume"
                    .to_owned(),
            ));
        }
        ranking = found;
        ranking.removed.truncate(options.count);
    }
    let mut work = Work::new(model, options, calibration)?;
    while ranking.removed.len() < options.count {
        let skips: Skips = ranking.removed.iter().flat_map(Scored::sub_layers).collect();
        let left: Vec<SubLayer> = all.iter().filter(|site| !skips.contains(site)).copied().collect();
        let open: Vec<SubLayer> =
            left.iter().filter(|site| !options.protected(model, **site)).copied().collect();
        let candidates = if open.is_empty() { left } else { open };
        let scores = work.round(&candidates, &skips, progress)?;
        let scored: Vec<Scored> =
            candidates.iter().zip(&scores).map(|(site, score)| Scored::new(*site, *score)).collect();
        // Of equals the first.
        let best = scored.iter().copied().reduce(|a, b| if b.score < a.score { b } else { a });
        if ranking.removed.is_empty() {
            ranking.scores = scored;
        }
        ranking.removed.extend(best);
        ranking.unfinished = ranking.removed.len() < options.count;
        save(&ranking)?;
    }
    ranking.unfinished = false;
    Ok(ranking)
}

/// What a search keeps from round to round.
struct Work<'a> {
    model: &'a Model,
    options: &'a FinerCut,
    calibration: &'a Calibration,
    /// The last states of the whole model, a window each.
    whole: Vec<Panels>,
    cache: llmpress_model::Cache,
}

/// The residual before each sub-layer.
#[derive(Default)]
struct Prefixes(Vec<(SubLayer, Panels)>);

impl Observer for Prefixes {
    fn before(&mut self, site: SubLayer, residual: &Panels) {
        self.0.push((site, clone(residual)));
    }
}

fn clone(panels: &Panels) -> Panels {
    let mut copy = Panels::zeros(panels.features(), panels.tokens());
    copy.data_mut().copy_from_slice(panels.data());
    copy
}

impl<'a> Work<'a> {
    fn new(model: &'a Model, options: &'a FinerCut, calibration: &'a Calibration) -> Result<Self> {
        let mut work =
            Self { model, options, calibration, whole: Vec::new(), cache: model.cache(calibration.length()) };
        for window in calibration.windows() {
            let mut h = model.embed(window)?;
            work.run(0, &mut h, &Skips::new(), &mut llmpress_model::Unobserved)?;
            work.whole.push(model.last_norm(&h)?);
        }
        Ok(work)
    }

    fn run(
        &mut self,
        first: usize,
        h: &mut Panels,
        skips: &Skips,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        self.cache.clear();
        let layers = self.model.config().layers.len();
        self.model.run_layers(first..layers, h, &mut self.cache, skips, observer)
    }

    /// The distance of each candidate's loss, in order.
    fn round(
        &mut self,
        candidates: &[SubLayer],
        skips: &Skips,
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<f64>> {
        let mut sums = vec![Distance::default(); candidates.len()];
        for (index, window) in self.calibration.windows().iter().enumerate() {
            let reference = self.model.logits(&self.whole[index])?;
            let mut prefixes = Prefixes::default();
            if self.options.search == Search::CachedPrefixes {
                let mut h = self.model.embed(window)?;
                self.run(0, &mut h, skips, &mut prefixes)?;
            }
            for (candidate, sum) in candidates.iter().zip(&mut sums) {
                let mut without = skips.clone();
                without.insert(*candidate);
                // Where both sub-layers of a layer read the same, it runs as a whole.
                let parallel = self.model.config().blueprint.parallel;
                let start = if parallel { SubLayer::Attention(layer_of(*candidate)) } else { *candidate };
                let prefix = prefixes.0.iter().find(|(site, _)| *site == start);
                let h = match prefix {
                    None => {
                        let mut h = self.model.embed(window)?;
                        self.run(0, &mut h, &without, &mut llmpress_model::Unobserved)?;
                        h
                    }
                    Some((site, residual)) => {
                        // What comes before in its layer is done.
                        if let SubLayer::Mlp(layer) = site {
                            without.insert(SubLayer::Attention(*layer));
                        }
                        let mut h = clone(residual);
                        self.run(layer_of(*site), &mut h, &without, &mut llmpress_model::Unobserved)?;
                        h
                    }
                };
                let logits = self.model.logits(&self.model.last_norm(&h)?)?;
                sum.add(&distances(self.options.distance, &reference, &logits));
                progress();
            }
        }
        Ok(sums.iter().map(|sum| sum.value(self.options.distance)).collect())
    }
}
