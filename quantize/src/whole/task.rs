//! What is to be learned of a whole model, and what it comes to.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use llmpress_calibrate::{Calibration, named};
use llmpress_formats::encoding::abq::Packed;
use llmpress_formats::{Error, Result};
use llmpress_learn::{HELD_BACK, Order, Schedule, Watch, Window, train};
use llmpress_model::{Model, SubLayer};

use super::record::Record;
use super::trainer::{Best, Trainer};
use crate::learn::each_by_itself;
use crate::{Learn, Learned, Quantiser, Spec};

/// Windows that a step sees.
pub(crate) const BATCH: u32 = 4;
/// The share of the divergence from the dense model in the loss; the likelihood of the text has the rest.
const KD: f32 = 0.9;
/// The most windows that are held back to judge by.
const MOST_HELD: usize = 16;
/// Evaluations of a run, beside that of its start.
const EVALUATIONS: u32 = 10;

/// What is to be learned.
#[derive(Clone, Copy)]
pub struct WholeTask<'a> {
    /// The dense model: the teacher, and where weights lay before they were rounded.
    pub dense: &'a Model,
    /// The model as the rungs below left it, with its transformations: what matrices that are not learned multiply by, what they
    /// quantise, and all that stands between them.
    pub start: &'a Model,
    /// How each tensor is quantised. Those whose grain is [`crate::Grain::Model`] are learned.
    pub specs: &'a BTreeMap<String, Spec>,
    /// What the rungs below made of such a tensor.
    pub unit: &'a dyn Fn(&str) -> Result<Packed<'static>>,
    /// The windows to learn from, of which one in sixteen, sixteen at most, is held back to judge by.
    pub calibration: &'a Calibration,
}

impl WholeTask<'_> {
    /// Steps of the run, and the tokens of each.
    pub fn extent(&self) -> (u32, u64) {
        let tokens = u64::from(BATCH) * self.calibration.length().saturating_sub(1) as u64;
        (self.steps_and_seed().map_or(0, |(steps, _)| steps), tokens)
    }

    /// The longest run that any tensor asks for; none where none does.
    fn steps_and_seed(&self) -> Option<(u32, u64)> {
        let windows = self.calibration.windows().len();
        let learn = self.specs.values().filter_map(|spec| Some((spec.whole()?, spec.abq.bits)));
        learn.map(|(learn, bits)| (learn.steps(bits, windows), learn.seed)).max()
    }
}

/// What learning a whole model came to.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnedWhole {
    /// What each tensor is from now on; none where nothing was better than the start.
    pub units: Vec<(String, Packed<'static>)>,
    /// The tensors that were to be learned.
    pub tensors: Vec<String>,
    /// The loss on windows that no step saw, before and after: of the best state there was.
    pub learned: Learned,
    /// Why the start stays, where a loss was NaN or infinite.
    pub unlearned: Option<String>,
}

/// How it is learned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) steps: u32,
    pub(super) kd: f32,
}

/// Refuses a model that cannot be learned as a whole, by name.
///
/// # Errors
/// A family with parts that have no derivatives; experts; a sub-layer whose matrices quantise what they share to other bits each.
pub fn check(model: &Model, specs: &BTreeMap<String, Spec>) -> Result<()> {
    let Some((tensor, spec)) = specs.iter().find(|(_, spec)| spec.whole().is_some()) else { return Ok(()) };
    let asked = Quantiser::of(*spec);
    llmpress_learn::check(model).map_err(|e| named(tensor, e))?;
    match model.sub_layers().into_iter().find(|site| each_by_itself(model, *site, specs)) {
        Some(SubLayer::Attention(layer) | SubLayer::Mlp(layer)) => Err(Error::Invalid(format!(
            "{asked}: layer {layer} has experts, whose tokens depend on what is learned, or matrices that quantise what they share to other \
             bits each: no whole model is learned so; take learn, which learns each of these by itself"
        ))),
        None => Ok(()),
    }
}

/// Learns a whole model. `from` is a state that [`Watch::keep`] kept, with its path for errors; one of another run is not taken up.
/// None where the run was stopped.
///
/// # Errors
/// Those of [`check`]; too few windows; what cannot be read; what `watch` says.
pub fn learn_whole(
    task: WholeTask<'_>,
    from: Option<(&mut dyn Read, &Path)>,
    watch: &mut dyn Watch<Record>,
) -> Result<Option<LearnedWhole>> {
    check(task.start, task.specs)?;
    let windows: Vec<Window<'_>> = task.calibration.windows().iter().map(|ids| window(ids)).collect();
    Learn::check_windows(windows.len())?;
    let (seen, held) = split(&windows);
    let Some((steps, seed)) = task.steps_and_seed() else {
        return Err(Error::Invalid("nothing is to be learned with the whole model".to_owned()));
    };
    let settings = Settings { steps, kd: KD };
    let mut trainer = Trainer::new(&task, settings, (held, key(&task, steps, seed)?))?;
    let mut order = Order::new(seen, seed);
    let schedule = Schedule { steps, batch: BATCH, evaluate: steps.div_ceil(EVALUATIONS) };
    if !train(&mut trainer, &mut order, schedule, from, watch)? {
        return Ok(None);
    }
    let Trainer { matrices, before, best, failed, .. } = trainer;
    let unlearned = failed.map(|step| {
        let when = if step == 0 { "at the start".to_owned() } else { format!("at step {step}") };
        format!(
            "the loss of learning the whole model was NaN or infinite {when} (steps={steps}, seed={seed})"
        )
    });
    let best: Option<Best> = best.filter(|_| failed.is_none());
    let after = best.as_ref().map(|best| best.loss);
    let best = best.filter(|best| best.step > 0);
    Ok(Some(LearnedWhole {
        units: best.as_ref().map_or(Ok(Vec::new()), |best| matrices.pack(&best.snapshots))?,
        tensors: matrices.tensors(),
        learned: Learned { before, after, taken: best.is_some() },
        unlearned,
    }))
}

/// A window, and what came after each of its tokens but the last.
fn window(ids: &[u32]) -> Window<'_> {
    Window { ids: ids.split_last().map_or(&[], |(_, ids)| ids), labels: ids.get(1..).unwrap_or_default() }
}

/// The windows that steps see, and those that none does.
fn split<'a>(windows: &[Window<'a>]) -> (Vec<Window<'a>>, Vec<Window<'a>>) {
    let apart = (windows.len() / MOST_HELD).max(HELD_BACK);
    let (mut seen, mut held) = (Vec::new(), Vec::new());
    for (at, window) in windows.iter().enumerate() {
        match at % apart == apart / 2 && held.len() < MOST_HELD {
            true => held.push(*window),
            false => seen.push(*window),
        }
    }
    (seen, held)
}

/// Of what run a state is.
fn key(task: &WholeTask<'_>, steps: u32, seed: u64) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{steps} {seed} {}", task.calibration.digest()).as_bytes());
    for (tensor, spec) in task.specs {
        hasher.update(format!("\n{tensor} {}\n", Quantiser::of(*spec)).as_bytes());
        if spec.whole().is_some() {
            let unit = (task.unit)(tensor)?;
            unit.components().iter().for_each(|(_, bytes)| {
                hasher.update(bytes);
            });
        }
    }
    Ok(*hasher.finalize().as_bytes())
}
