//! The rung above error feedback: matrices learned together.
//!
//! ```text
//! inputs: residual streams of the model as it is quantised so far      targets: the original's, after the sub-layer
//!
//! a matrix on its grids    latent.rs     a sub-layer at a time    here
//!                                        a block at a time        block.rs, with what else is learned: beside.rs
//!                                        all of them, at last     ../whole.rs
//! ```

mod beside;
mod block;

use std::collections::BTreeMap;
use std::time::Instant;

use llmpress_calibrate::Streams;
use llmpress_formats::Result;
use llmpress_formats::encoding::PackedUnit;
use llmpress_learn::{Net, Outcome, Settings, Variable, reconstruct, unlearnable};
use llmpress_model::{Body, Linear, Model, SubLayer};

pub(crate) use block::{StreamsOf, ToLearnBlock};

use crate::latent::{Latent, Still};
use crate::on_grid::OnGrid;
use crate::report::Learned;
use crate::{Finished, Rung, Spec};

/// The rate of a second try.
const SLOWER: f32 = 0.2;

/// Whether the matrices of a sub-layer are learned each by itself: those of experts, whose tokens depend on what is learned,
/// such as quantise what they multiply together to other bits each, and those of families with a part that has no derivative.
pub(crate) fn each_by_itself(model: &Model, site: SubLayer, specs: &BTreeMap<String, Spec>) -> bool {
    let bits = |linear: &Linear| {
        specs.get(linear.tensor()).map_or(linear.activation_bits(), |spec| spec.abq.activation_bits)
    };
    let differ = |linears: &[Linear]| linears.windows(2).any(|two| bits(&two[0]) != bits(&two[1]));
    if unlearnable(model).is_some() {
        return true;
    }
    match model.parts(site).map(|parts| parts.body) {
        Some(Body::Experts | Body::Plain | Body::Mixer) => true,
        Some(Body::Attention { projections, .. }) => differ(projections),
        Some(Body::Gated { gate_up, .. }) => differ(gate_up),
        None => false,
    }
}

/// The matrices of a sub-layer that are to be learned.
pub(crate) struct ToLearn {
    net: Net,
    /// Of each matrix of the net; none of one that stays as it is.
    specs: Vec<Option<Spec>>,
    settings: Settings,
}

/// A tensor, its new weights, and the bits to which what they multiply is quantised.
pub(crate) type Changed = (String, Vec<f32>, Option<u8>);

impl ToLearn {
    /// Of a sub-layer whose linears are `tensors`; none where nothing is to be learned, or nothing can be: experts.
    pub(crate) fn of(
        model: &Model,
        site: SubLayer,
        (specs, windows): (&BTreeMap<String, Spec>, usize),
    ) -> Option<Self> {
        let net = Net::new(model, site)?;
        let specs: Vec<Option<Spec>> = net
            .tensors()
            .iter()
            .map(|tensor| specs.get(tensor).copied().filter(|spec| spec.by_layer().is_some()))
            .collect();
        let (SubLayer::Attention(layer) | SubLayer::Mlp(layer)) = site;
        let mlp = matches!(site, SubLayer::Mlp(_));
        let settings = settings(specs.iter().flatten(), windows, 2 * layer as u64 + u64::from(mlp))?;
        Some(Self { net, specs, settings })
    }

    /// Steps that it takes.
    pub(crate) fn steps(&self) -> u32 {
        self.settings.steps
    }

    /// The tensors of the sub-layer.
    pub(crate) fn tensors(&self) -> &[String] {
        self.net.tensors()
    }

    /// Learns them. `finished` holds what error feedback made of them, and takes what is better. Returns what has changed.
    ///
    /// # Errors
    /// Weights or streams that cannot be read.
    pub(crate) fn learn(
        &self,
        model: &Model,
        original: &Model,
        streams: (&mut Streams, &mut Streams),
        finished: &mut [Finished],
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<Changed>> {
        let started = Instant::now();
        let (now, targets) = streams;
        let start = |finished: &[Finished]| {
            let matrices = self.net.tensors().iter().zip(&self.specs);
            let start = |(tensor, spec): (&String, &Option<Spec>)| {
                Either::start((tensor, *spec), (model, original), finished)
            };
            matrices.map(start).collect::<Result<Vec<_>>>()
        };
        let mut variables = start(finished)?;
        let mut learn = |variables: &mut [Either], rate: f32, progress: &mut dyn FnMut()| {
            let mut all: Vec<&mut dyn Variable> = variables.iter_mut().map(Either::variable).collect();
            let settings = Settings { rate, ..self.settings };
            reconstruct(&self.net, &mut all, (&mut *now, &mut *targets), settings, progress)
        };
        let mut outcome = learn(&mut variables, 1.0, progress)?;
        if !outcome.is_better() && outcome.before.is_finite() {
            // What error feedback left hardly anything to gain from wants smaller steps.
            variables.clear();
            variables = start(finished)?;
            outcome = learn(&mut variables, SLOWER, &mut || ())?;
        }
        let seconds = started.elapsed().as_secs_f64();
        let (what, layer) = match self.net.site() {
            SubLayer::Attention(layer) => ("the attention of layer", layer),
            SubLayer::Mlp(layer) => ("the MLP of layer", layer),
        };
        let unlearned = unlearned(&format!("{what} {layer}"), outcome, (self.settings, &self.specs));
        take((self.net.tensors(), &self.specs), variables, (outcome, seconds, unlearned), finished)
    }
}

/// How long is learned, and from which of so many windows: the longest that any spec asks for; `at` is which sub-layer or block it is.
/// None where nothing is.
fn settings<'a>(specs: impl Iterator<Item = &'a Spec>, windows: usize, at: u64) -> Option<Settings> {
    let of_spec =
        |spec: &Spec| spec.by_layer().map(|learn| (learn.steps(spec.abq.bits, windows), learn.seed));
    let (steps, seed) = specs.filter_map(of_spec).max()?;
    let seed = seed.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    Some(Settings { steps, batch: 1, seed, rate: 1.0 })
}

/// Why nothing of `what` was learned, where a loss says nothing.
fn unlearned(what: &str, outcome: Outcome, (settings, specs): (Settings, &[Option<Spec>])) -> Option<String> {
    if outcome.before.is_finite() && outcome.after.is_finite() {
        return None;
    }
    let when = if outcome.before.is_finite() { "on the way" } else { "at the start" };
    let seed = specs.iter().flatten().filter_map(|spec| spec.learn).map(|learn| learn.seed).max()?;
    Some(format!(
        "the loss of learning {what} was NaN or infinite {when} (steps={}, seed={seed})",
        settings.steps
    ))
}

/// Says of each matrix that was learned what came of it, and takes it where that is better. Returns what has changed.
fn take(
    (tensors, specs): (&[String], &[Option<Spec>]),
    variables: Vec<Either>,
    (outcome, seconds, unlearned): (Outcome, f64, Option<String>),
    finished: &mut [Finished],
) -> Result<Vec<Changed>> {
    let seconds = seconds / variables.len().max(1) as f64;
    let mut changed = Vec::new();
    for ((tensor, spec), variable) in tensors.iter().zip(specs).zip(variables) {
        let bits = spec.and_then(|spec| spec.abq.activation_bits);
        let Either::Learned(matrix) = variable else { continue };
        let Some(done) = finished.iter_mut().find(|done| done.tensor == *tensor) else { continue };
        done.report.seconds += seconds;
        done.report.learned = Some(Learned::of(outcome));
        done.report.unlearned.clone_from(&unlearned);
        if outcome.is_better() {
            let (unit, weights) = matrix.finish()?;
            done.unit = PackedUnit::Abq(unit);
            changed.push((tensor.clone(), weights, bits));
        }
    }
    Ok(changed)
}

/// A matrix of what is learned.
pub(crate) enum Either {
    Learned(Box<dyn OnGrid>),
    Still(Still),
}

impl Either {
    /// As error feedback left it.
    fn start(
        (tensor, spec): (&str, Option<Spec>),
        (model, original): (&Model, &Model),
        finished: &[Finished],
    ) -> Result<Self> {
        let start = finished.iter().find(|done| done.tensor == *tensor);
        let unit = start.filter(|start| start.report.rung == Rung::Gptq).and_then(|start| start.unit.abq());
        Ok(match (spec, unit) {
            // A lower rung is where too few tokens were seen to go by.
            (Some(spec), Some(unit)) => {
                Self::Learned(Box::new(Latent::new(unit, spec, &original.weights(tensor)?)))
            }
            _ => Self::Still(Still(model.weights(tensor)?)),
        })
    }

    fn variable(&mut self) -> &mut dyn Variable {
        match self {
            Self::Learned(matrix) => matrix.as_mut(),
            Self::Still(still) => still,
        }
    }

    fn weights(&self) -> &[f32] {
        match self {
            Self::Learned(matrix) => matrix.weights(),
            Self::Still(still) => still.weights(),
        }
    }
}
