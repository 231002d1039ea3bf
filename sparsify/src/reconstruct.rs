//! Reconstruction of a sub-layer: its sparse matrices learned together, masks kept.
//!
//! ```text
//! inputs: residual streams of the model as it is sparse so far      targets: the original's, after the sub-layer
//! ```

use std::collections::BTreeMap;
use std::time::Instant;

use llmpress_calibrate::Streams;
use llmpress_formats::Result;
use llmpress_learn::{Net, Outcome, Settings, Variable, reconstruct, unlearnable};
use llmpress_model::{Body, Model, SubLayer};

use crate::masked::{Masked, Still};
use crate::report::{Finished, Lesson, Part, Reconstructed};
use crate::{Reconstruct, Sparsifier};

/// The rate of a second try.
const SLOWER: f32 = 0.2;
/// Windows of a step.
const BATCH: usize = 1;

/// Why a sub-layer's matrices cannot be reconstructed together: those of experts, whose tokens depend on what is learned, and those of
/// families with a part that has no derivative.
pub(crate) fn why_not(model: &Model, site: SubLayer) -> Option<String> {
    let of_experts = matches!(model.parts(site).map(|parts| parts.body), Some(Body::Experts));
    let experts = "experts see other tokens as they are learned: they are not reconstructed";
    let of_family = || unlearnable(model).map(|why| format!("{why}: its matrices are not reconstructed"));
    of_experts.then(|| experts.to_owned()).or_else(of_family)
}

/// The matrices of a sub-layer that are to be reconstructed.
pub(crate) struct ToLearn {
    net: Net,
    /// Which of them.
    asked: Vec<bool>,
    settings: Settings,
}

impl ToLearn {
    /// Of a sub-layer; none where nothing is asked for, or nothing can be: experts.
    pub(crate) fn of(model: &Model, site: SubLayer, hows: &BTreeMap<String, Sparsifier>) -> Option<Self> {
        let net = Net::new(model, site)?;
        let of = |tensor: &String| hows.get(tensor).and_then(|how| how.reconstruct);
        let asked: Vec<bool> = net.tensors().iter().map(|tensor| of(tensor).is_some()).collect();
        let longest = net.tensors().iter().filter_map(of).map(|r: Reconstruct| (r.steps(), r.seed)).max();
        let (steps, seed) = longest?;
        let (part, layer) = Part::of(site);
        let at = 2 * layer as u64 + u64::from(part == Part::Mlp);
        let seed = seed.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Some(Self { net, asked, settings: Settings { steps, batch: BATCH, seed, rate: 1.0 } })
    }

    /// Steps that it takes.
    pub(crate) fn steps(&self) -> u32 {
        self.settings.steps
    }

    /// Learns them. `finished` holds what their rules made of them, and takes what is better. Returns what it came to, where
    /// there was anything to learn; the tensors that have changed are in `finished`.
    ///
    /// # Errors
    /// Weights or streams that cannot be read.
    pub(crate) fn learn(
        &self,
        model: &Model,
        (now, targets): (&mut Streams, &mut Streams),
        finished: &mut [Finished],
        progress: &mut dyn FnMut(),
    ) -> Result<Option<Lesson>> {
        let started = Instant::now();
        let start = |finished: &[Finished]| {
            let matrices = self.net.tensors().iter().zip(&self.asked);
            let start = |(tensor, asked): (&String, &bool)| {
                let start = finished.iter().find(|done| done.tensor == *tensor).filter(|_| *asked);
                Ok(match start {
                    Some(start) => Either::Learned(Box::new(Masked::new(start))),
                    None => Either::Still(Still(model.weights(tensor)?)),
                })
            };
            matrices.map(start).collect::<Result<Vec<_>>>()
        };
        let mut variables = start(finished)?;
        if variables.iter().all(|variable| matches!(variable, Either::Still(_))) {
            return Ok(None);
        }
        let mut learn = |variables: &mut [Either], rate: f32, progress: &mut dyn FnMut()| {
            let mut all: Vec<&mut dyn Variable> = variables.iter_mut().map(Either::variable).collect();
            let settings = Settings { rate, ..self.settings };
            reconstruct(&self.net, &mut all, (&mut *now, &mut *targets), settings, progress)
        };
        let mut outcome = learn(&mut variables, 1.0, progress)?;
        if !outcome.is_better() && outcome.before.is_finite() {
            // Where there is hardly anything to gain smaller steps are wanted.
            variables.clear();
            variables = start(finished)?;
            outcome = learn(&mut variables, SLOWER, &mut || ())?;
        }
        let seconds = started.elapsed().as_secs_f64() / variables.len().max(1) as f64;
        Ok(Some(self.take(variables, (outcome, seconds), finished)))
    }

    /// Says of each matrix that was learned what came of it, and takes it where that is better.
    fn take(
        &self,
        variables: Vec<Either>,
        (outcome, seconds): (Outcome, f64),
        finished: &mut [Finished],
    ) -> Lesson {
        let (what, layer) = Part::of(self.net.site());
        let reconstructed = Reconstructed::of(outcome);
        let unlearned = match (reconstructed.before, reconstructed.after) {
            (Some(_), Some(_)) => None,
            (before, _) => Some(format!(
                "the loss of reconstructing the {} of layer {layer} was NaN or infinite {} (steps={})",
                what.name(),
                if before.is_some() { "on the way" } else { "at the start" },
                self.settings.steps
            )),
        };
        let mut tensors = Vec::new();
        for (tensor, variable) in self.net.tensors().iter().zip(variables) {
            let Either::Learned(matrix) = variable else { continue };
            let Some(done) = finished.iter_mut().find(|done| done.tensor == *tensor) else { continue };
            done.report.seconds += seconds;
            done.report.reconstructed = Some(reconstructed);
            done.report.unlearned.clone_from(&unlearned);
            if outcome.is_better() {
                matrix.finish(done);
            }
            tensors.push(tensor.clone());
        }
        Lesson { layer, what, tensors, steps: self.settings.steps, reconstructed }
    }
}

/// A matrix of what is learned.
enum Either {
    Learned(Box<Masked>),
    Still(Still),
}

impl Either {
    fn variable(&mut self) -> &mut dyn Variable {
        match self {
            Self::Learned(matrix) => matrix.as_mut(),
            Self::Still(still) => still,
        }
    }
}
