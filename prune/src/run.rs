//! Carrying out a pruning: the ranking that it asks for.

use llmpress_calibrate::Calibration;
use llmpress_formats::{Error, Result};
use llmpress_model::{Model, SubLayer};

use crate::{
    FinerCut, Method, Pass, Ranking, Search, Target, drop_ranking, finercut, last_ranking, random_ranking,
};

/// What the work of a ranking is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Windows of the text.
    Windows,
    /// Forward passes over a window.
    Passes,
}

/// Is told how far a ranking is, and keeps what it has found so far.
pub trait Watch {
    /// The work there is.
    fn start(&mut self, total: u64, counted: Counted);
    /// One more is done.
    fn step(&mut self);
    /// A search made a choice and can go on from here.
    ///
    /// # Errors
    /// It cannot be kept: the search ends.
    fn save(&mut self, ranking: &Ranking) -> Result<()>;
}

impl Target {
    /// How many there are in a model.
    fn candidates(self, model: &Model) -> usize {
        let present = model.sub_layers();
        let attentions = present.iter().filter(|site| matches!(site, SubLayer::Attention(_))).count();
        let whole = |site: &&SubLayer| match site {
            SubLayer::Attention(layer) => present.contains(&SubLayer::Mlp(*layer)),
            SubLayer::Mlp(_) => false,
        };
        match self {
            Self::Attention => attentions,
            Self::Mlp => present.len() - attentions,
            Self::Joint => present.len(),
            Self::Block => present.iter().filter(whole).count(),
        }
    }
}

impl Pass {
    /// Windows that are read where nobody says how many.
    pub fn default_windows(&self) -> usize {
        match self.method {
            Method::FinerCut { .. } => 10,
            _ => 64,
        }
    }

    /// What amounts are of, for people.
    pub(crate) fn what(&self) -> &'static str {
        match self.method {
            Method::Drop { target: Target::Attention, .. } => "attentions",
            Method::Drop { target: Target::Mlp, .. } => "MLPs",
            Method::Drop { target: Target::Block, .. } => "layers",
            _ => "sub-layers",
        }
    }

    /// How many entries of a ranking it takes.
    ///
    /// # Errors
    /// More than there are, or none.
    pub fn count(&self, ranking: &Ranking) -> Result<usize> {
        let total = match self.method {
            Method::FinerCut { .. } | Method::Random { .. } | Method::Last => ranking.sub_layers,
            Method::Drop { .. } => ranking.scores.len(),
        };
        self.amount.of(total, self.what())
    }

    /// Ranks a model's sub-layers. `found` is what an earlier run of a search kept.
    ///
    /// # Errors
    /// No calibration where one is needed; an amount that there is not; weights that cannot be read; what `watch` says.
    pub fn rank(
        &self,
        model: &Model,
        calibration: Option<&Calibration>,
        found: Option<Ranking>,
        watch: &mut dyn Watch,
    ) -> Result<Ranking> {
        let needed = || calibration.ok_or_else(|| Error::Invalid(format!("{self} goes by a text")));
        match self.method {
            Method::Random { seed } => Ok(random_ranking(model, seed)),
            Method::Last => Ok(last_ranking(model)),
            Method::Drop { target, iterative } => {
                let calibration = needed()?;
                // The amount is checked before the work.
                let count = self.amount.of(target.candidates(model), self.what())?;
                let rounds = if iterative { count } else { 1 };
                watch.start((rounds * calibration.windows().len()) as u64, Counted::Windows);
                drop_ranking(model, target, iterative.then_some(rounds), calibration, &mut || watch.step())
            }
            Method::FinerCut { distance, protect } => {
                let calibration = needed()?;
                let count = self.amount.of(model.sub_layers().len(), self.what())?;
                let options = FinerCut { distance, protect, count, search: Search::CachedPrefixes };
                let done = found.as_ref().map_or(0, |ranking| ranking.removed.len()).min(count);
                let passes: usize = options.candidates(model).iter().skip(done).sum();
                watch.start((passes * calibration.windows().len()) as u64, Counted::Passes);
                let watch = std::cell::RefCell::new(watch);
                finercut(
                    model,
                    &options,
                    calibration,
                    found,
                    &mut || watch.borrow_mut().step(),
                    &mut |ranking| watch.borrow_mut().save(ranking),
                )
            }
        }
    }
}
