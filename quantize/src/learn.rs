//! The rung above error feedback: the matrices of a sub-layer learned together.
//!
//! ```text
//! inputs: residual streams of the model as it is quantised so far      targets: the original's, after the sub-layer
//! ```

use std::collections::BTreeMap;
use std::time::Instant;

use llmpress_calibrate::Streams;
use llmpress_formats::Result;
use llmpress_learn::{Net, Outcome, Settings, Variable, reconstruct};
use llmpress_model::{Body, Linear, Model, SubLayer};

use crate::latent::{Latent, Still};
use crate::report::Learned;
use crate::{Finished, Rung, Spec};

/// The rate of a second try.
const SLOWER: f32 = 0.2;

/// Whether the matrices of a sub-layer are learned each by itself: those of experts, whose tokens depend on what is learned, and
/// such as quantise what they multiply together to other bits each.
pub(crate) fn each_by_itself(model: &Model, site: SubLayer, specs: &BTreeMap<String, Spec>) -> bool {
    let bits = |linear: &Linear| {
        specs.get(linear.tensor()).map_or(linear.activation_bits(), |spec| spec.abq.activation_bits)
    };
    let differ = |linears: &[Linear]| linears.windows(2).any(|two| bits(&two[0]) != bits(&two[1]));
    match model.parts(site).map(|parts| parts.body) {
        Some(Body::Experts) => true,
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
    /// The seed as it was asked for, the same for all sub-layers.
    asked_seed: u64,
}

/// A tensor, its new weights, and the bits to which what they multiply is quantised.
pub(crate) type Changed = (String, Vec<f32>, Option<u8>);

impl ToLearn {
    /// Of a sub-layer whose linears are `tensors`; none where nothing is to be learned, or nothing can be: experts.
    pub(crate) fn of(model: &Model, site: SubLayer, specs: &BTreeMap<String, Spec>) -> Option<Self> {
        let net = Net::new(model, site)?;
        let specs: Vec<Option<Spec>> = net
            .tensors()
            .iter()
            .map(|tensor| specs.get(tensor).copied().filter(|spec| spec.learn.is_some()))
            .collect();
        // The longest that any of them asks for.
        let of_spec = |spec: &Spec| spec.learn.map(|learn| (learn.steps(spec.abq.bits), learn.seed));
        let (steps, asked_seed) = specs.iter().flatten().filter_map(of_spec).max()?;
        let (SubLayer::Attention(layer) | SubLayer::Mlp(layer)) = site;
        let mlp = matches!(site, SubLayer::Mlp(_));
        let seed =
            asked_seed.wrapping_add((2 * layer as u64 + u64::from(mlp)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Some(Self { net, specs, settings: Settings { steps, batch: 1, seed, rate: 1.0 }, asked_seed })
    }

    /// Steps that it takes.
    pub(crate) fn steps(&self) -> u32 {
        self.settings.steps
    }

    /// The tensors of the sub-layer.
    pub(crate) fn tensors(&self) -> &[String] {
        self.net.tensors()
    }

    /// Why nothing was learned, where a loss says nothing.
    fn unlearned(&self, outcome: &Outcome) -> Option<String> {
        if outcome.before.is_finite() && outcome.after.is_finite() {
            return None;
        }
        let when = if outcome.before.is_finite() { "on the way" } else { "at the start" };
        let (what, layer) = match self.net.site() {
            SubLayer::Attention(layer) => ("attention", layer),
            SubLayer::Mlp(layer) => ("MLP", layer),
        };
        Some(format!(
            "the loss of learning the {what} of layer {layer} was NaN or infinite {when} (steps={}, seed={})",
            self.settings.steps, self.asked_seed
        ))
    }

    /// Each matrix as error feedback left it.
    fn start(&self, model: &Model, original: &Model, finished: &[Finished]) -> Result<Vec<Either>> {
        let mut variables: Vec<Either> = Vec::new();
        for (tensor, spec) in self.net.tensors().iter().zip(&self.specs) {
            let start = finished.iter().find(|done| done.tensor == *tensor);
            variables.push(match (spec, start) {
                // A lower rung is where too few tokens were seen to go by.
                (Some(spec), Some(start)) if start.report.rung == Rung::Gptq => {
                    Either::Learned(Latent::new(&start.unit, *spec, &original.weights(tensor)?))
                }
                _ => Either::Still(Still(model.weights(tensor)?)),
            });
        }
        Ok(variables)
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
        let mut variables = self.start(model, original, finished)?;
        let mut learn = |variables: &mut [Either], rate: f32, progress: &mut dyn FnMut()| {
            let mut all: Vec<&mut dyn Variable> = variables.iter_mut().map(Either::variable).collect();
            let settings = Settings { rate, ..self.settings };
            reconstruct(&self.net, &mut all, (&mut *now, &mut *targets), settings, progress)
        };
        let mut outcome = learn(&mut variables, 1.0, progress)?;
        if !outcome.is_better() && outcome.before.is_finite() {
            // What error feedback left hardly anything to gain from wants smaller steps.
            variables.clear();
            variables = self.start(model, original, finished)?;
            outcome = learn(&mut variables, SLOWER, &mut || ())?;
        }
        let seconds = started.elapsed().as_secs_f64() / variables.len().max(1) as f64;
        let mut changed = Vec::new();
        for ((tensor, spec), variable) in self.net.tensors().iter().zip(&self.specs).zip(variables) {
            let bits = spec.and_then(|spec| spec.abq.activation_bits);
            let Either::Learned(latent) = variable else { continue };
            let Some(done) = finished.iter_mut().find(|done| done.tensor == *tensor) else { continue };
            done.report.seconds += seconds;
            done.report.learned = Some(Learned {
                before: outcome.before,
                after: Some(outcome.after).filter(|after| after.is_finite()),
                taken: outcome.is_better(),
            });
            done.report.unlearned = self.unlearned(&outcome);
            if outcome.is_better() {
                let (unit, weights) = latent.finish()?;
                done.unit = unit;
                changed.push((tensor.clone(), weights, bits));
            }
        }
        Ok(changed)
    }
}

enum Either {
    Learned(Latent),
    Still(Still),
}

impl Either {
    fn variable(&mut self) -> &mut dyn Variable {
        match self {
            Self::Learned(latent) => latent,
            Self::Still(still) => still,
        }
    }
}
