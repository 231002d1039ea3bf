//! The pass: block by block, each on what the quantised blocks before it give out.
//!
//! ```text
//! streams --norm--> moments --> q, k, v    new weights in the model
//!         --attention--> moments --> o     so that what follows sees them
//!         --attention--> streams           likewise the MLP: gate and up, then down; experts some at a time
//! finished units, streams --> sink         then the block's own weights again
//! ```
//!
//! With transformations each block is folded before, and both streams are those of the transformed model.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use llmpress_calibrate::{
    Calibration, Extent, MOST_COLUMNS, Moments, Residuals, Room, Shares, Tap, least_tokens, named,
    share_of_drift,
};
use llmpress_formats::encoding::abq;
use llmpress_formats::{Checkpoint, Dtype, Error, Result, Transform};
use llmpress_kernels::cpu::Elements;
use llmpress_model::{Model, Reads, SharedInput, SubLayer};

use crate::alone::Alone;
use crate::effort::Text;
use crate::kept::{Halved, is_halved};
use crate::learn::{StreamsOf, ToLearn, ToLearnBlock, each_by_itself};
use crate::lesson::{Lesson, Taught};
use crate::matrix::{Input, Matrix, quantise};
use crate::report::Finished;
use crate::whole::check as check_whole;
use crate::{Grain, Learn, Rung, Spec};

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// How each tensor is to be quantised; others stay. Those that are no linears of a layer go by no text.
    pub specs: &'a BTreeMap<String, Spec>,
    /// What is folded into the model before, and done whenever a token is read.
    pub transforms: &'a [Transform],
    /// The windows to go by; without them what goes by no text runs.
    pub calibration: Option<&'a Calibration>,
    /// Where streams may lie.
    pub room: &'a Room,
    /// Bytes that the Hessians of one sub-layer's experts may take together; one is gathered whatever it takes.
    pub hessians: u64,
}

impl Job<'_> {
    /// Whether error feedback makes up for what the layers before have lost, which takes the original's streams as well.
    fn makes_up(&self, model: &Model) -> bool {
        let layers = model.config().layers.len();
        self.calibration.is_some()
            && (0..layers).flat_map(|layer| model.inputs_of(layer)).any(|input| self.makes_up_for(&input))
    }

    /// Whether anything is learned by layers.
    fn learns(&self) -> bool {
        self.calibration.is_some() && self.specs.values().any(|spec| spec.by_layer().is_some())
    }

    /// What may be learned, and from how many windows.
    fn learning(&self) -> (&BTreeMap<String, Spec>, usize) {
        (self.specs, self.calibration.map_or(0, |calibration| calibration.windows().len()))
    }

    /// Whether the original's streams are kept beside those of the model as it is quantised so far.
    fn keeps_both(&self, model: &Model) -> bool {
        self.learns() || self.makes_up(model)
    }

    /// Streams that may be there at a time: 1 where there are none of the original.
    fn streams(&self, model: &Model) -> u64 {
        if !self.keeps_both(model) {
            return 1;
        }
        let whole = |learn: Learn| learn.grain == Grain::Block;
        if self.specs.values().filter_map(|spec| spec.learn).any(whole) { 4 } else { 2 }
    }

    /// Reads the streams that [`Residuals::save`] wrote in the same job; none where it goes by no text. `path` is for errors.
    ///
    /// # Errors
    /// A file that cannot be read, or is too short.
    pub fn residuals(&self, model: &Model, from: &mut dyn Read, path: &Path) -> Result<Option<Residuals>> {
        let Some(calibration) = self.calibration else { return Ok(None) };
        Residuals::load(model, calibration, (self.room, self.streams(model)), from, path).map(Some)
    }

    fn makes_up_for(&self, input: &SharedInput) -> bool {
        let of_expert = matches!(input.reads, Reads::ExpertTokens(_) | Reads::ExpertInner(_));
        let feedback = |tensor: &String| self.specs.get(tensor).is_some_and(|spec| spec.rung == Rung::Gptq);
        let tokens = self.calibration.map_or(0, Calibration::tokens);
        !of_expert
            && input.features <= MOST_COLUMNS
            && share_of_drift(tokens, input.features) > 0.0
            && input.tensors.iter().any(feedback)
    }
}

/// Where a job goes on.
#[derive(Debug, Default)]
pub struct State {
    /// Blocks that are finished.
    pub blocks: usize,
    /// The streams after them, where the job goes by a text and any is still needed.
    pub residuals: Option<Residuals>,
}

/// Takes what is finished.
pub trait Sink {
    /// The weights that there are to quantise; the work that this is, 1 for each of them and as much more for one that is to be
    /// learned as that takes longer; and how much of it was finished before.
    fn start(&mut self, weights: u64, work: u64, finished: u64) {
        let _ = (weights, work, finished);
    }

    /// So much more of the work is.
    fn step(&mut self, work: u64) {
        let _ = work;
    }

    /// Matrices were learned.
    fn learned(&mut self, lesson: &Lesson) {
        let _ = lesson;
    }

    /// The tensors of a block, from 0, are finished; last of all, as one more block, those that are in none. With `residuals`
    /// the job goes on from here: [`State`] of `block + 1` blocks.
    ///
    /// # Errors
    /// They cannot be kept: the job ends.
    fn block(
        &mut self,
        block: usize,
        finished: FinishedBlock,
        residuals: Option<&mut Residuals>,
    ) -> Result<()>;
}

/// What became of a block.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FinishedBlock {
    /// Its tensors.
    pub tensors: Vec<Finished>,
    /// What the model gets with them, beside what the job says: scales that were learned.
    pub transforms: Vec<Transform>,
}

/// Quantises a model's tensors. The model is as before at the end. What is to be learned with the whole model is left as the rungs below do: see
/// [`crate::learn_whole`].
///
/// # Errors
/// A family whose matrices or streams passes do not change, by name; a transformation that it does not support; a tensor that is not there, or is no matrix; a setting that the encoding
/// does not have; error feedback without a text, or too short a one; NaN or infinite activations or weights; what cannot be
/// read; what `sink` says.
pub fn run(model: &mut Model, job: Job<'_>, from: State, sink: &mut dyn Sink) -> Result<()> {
    llmpress_calibrate::check_layout(model)?;
    if job.transforms.is_empty() {
        return run_transformed(model, job, from, sink);
    }
    model.transform(job.transforms.to_vec())?;
    let result = run_transformed(model, job, from, sink);
    model.transform(Vec::new())?;
    result
}

/// Quantises a model that does its part of the transformations already; its layers are folded one by one.
fn run_transformed(model: &mut Model, job: Job<'_>, from: State, sink: &mut dyn Sink) -> Result<()> {
    let layers = model.config().layers.len();
    let inputs: Vec<Vec<SharedInput>> = (0..layers).map(|layer| model.inputs_of(layer)).collect();
    let plan = Plan::new(model, job, &inputs)?;
    let weights = |blocks: &[Vec<SharedInput>]| -> u64 {
        let tensors = blocks.iter().flatten().flat_map(|input| &input.tensors);
        tensors.filter(|t| job.specs.contains_key(*t)).map(|t| plan.weights(t) + plan.to_learn(t)).sum()
    };
    let done = from.blocks.min(layers);
    sink.start(plan.total, plan.work, weights(&inputs[..done]));
    // Streams are there up to the last layer that goes by them.
    let last = (0..layers).rev().find(|&layer| plan.goes_by_text(&inputs[layer]));
    let both = job.keeps_both(model);
    let mut residuals = from.residuals;
    if let (Some(calibration), Some(last)) = (job.calibration, last) {
        if done == 0 {
            residuals = Some(Residuals::embed(model, calibration, job.room, job.streams(model))?);
        } else if done <= last && residuals.as_ref().is_none_or(|r| r.original.is_some() != both) {
            return Err(Error::Invalid(format!("no streams to go on with after {done} finished blocks")));
        }
    }
    // The original, beside the one whose weights change.
    let mut original = if both { Some(model.twin()?) } else { None };
    if let Some(original) = original.as_mut().filter(|_| !job.transforms.is_empty()) {
        // What rounds is no part of what is to be made up for.
        let exact = job.transforms.iter().filter(|t| !matches!(t, Transform::Quantize { .. }));
        original.transform(exact.cloned().collect())?;
    }
    for (layer, inputs) in inputs.iter().enumerate().skip(done) {
        if last.is_none_or(|last| layer > last) {
            residuals = None;
        }
        let folds = !job.transforms.is_empty();
        let folded = match folds {
            true => model
                .fold_layer(layer)
                .and_then(|()| original.as_mut().map_or(Ok(()), |original| original.fold_layer(layer))),
            false => Ok(()),
        };
        let mut work = Work {
            plan: &plan,
            original: original.as_ref(),
            last,
            residuals,
            finished: vec![],
            transforms: vec![],
            left: 0,
        };
        let result = folded.and_then(|()| work.block(model, inputs, layer, sink));
        let (finished, transforms, after) = (work.finished, work.transforms, work.residuals);
        if !transforms.is_empty() {
            model.transform(job.transforms.to_vec())?;
        }
        if folds || !transforms.is_empty() {
            model.unfold_layer(layer)?;
        }
        if folds {
            original.as_mut().map_or(Ok(()), |original| original.unfold_layer(layer))?;
        }
        for tensor in inputs.iter().flat_map(|input| &input.tensors) {
            model.restore(tensor)?;
        }
        result?;
        residuals = after;
        let needed = last.is_some_and(|last| layer < last);
        let finished = FinishedBlock { tensors: finished, transforms };
        sink.block(layer, finished, residuals.as_mut().filter(|_| needed))?;
    }
    if from.blocks <= layers && !plan.others.is_empty() {
        let tensors = others(model, &plan, sink)?;
        sink.block(layers, FinishedBlock { tensors, transforms: vec![] }, None)?;
    }
    Ok(())
}

/// A job that was checked against a model.
struct Plan<'a> {
    job: Job<'a>,
    sizes: BTreeMap<&'a str, (usize, usize)>,
    /// Tensors that are no linears of a layer.
    others: Vec<&'a str>,
    /// Those that are learned by themselves.
    alone: BTreeSet<&'a str>,
    text: Text,
    /// Weights, and the work that they are.
    total: u64,
    work: u64,
}

impl<'a> Plan<'a> {
    fn new(model: &Model, job: Job<'a>, inputs: &'a [Vec<SharedInput>]) -> Result<Self> {
        let linears: BTreeMap<&str, &SharedInput> = inputs
            .iter()
            .flatten()
            .flat_map(|input| input.tensors.iter().map(move |t| (t.as_str(), input)))
            .collect();
        let by_itself = |input: &&SharedInput| each_by_itself(model, input.sub_layer, job.specs);
        let alone = inputs.iter().flatten().filter(by_itself).flat_map(|input| &input.tensors);
        check_whole(model, job.specs)?;
        let text = job.calibration.map_or(Text::default(), |calibration| Text {
            tokens: calibration.tokens() as u64,
            windows: calibration.windows().len(),
            window: calibration.length() as u64,
        });
        let mut plan = Self {
            job,
            sizes: BTreeMap::new(),
            others: Vec::new(),
            alone: alone.map(String::as_str).collect(),
            text,
            total: 0,
            work: 0,
        };
        for (tensor, spec) in job.specs {
            let named = |e| named(tensor, e);
            spec.check().map_err(named)?;
            let info = model.checkpoint().tensor(tensor)?;
            let Some((rows, cols)) = abq::matrix(&info.shape).filter(|_| abq::DTYPES.contains(&info.dtype))
            else {
                return Err(Error::Invalid(format!(
                    "{tensor}: {} of shape {:?} is no matrix of floating-point weights",
                    info.dtype.name(),
                    info.shape
                )));
            };
            if is_halved(model.checkpoint(), tensor)? {
                two_of_four(spec, job.transforms).map_err(named)?;
            }
            plan.total += rows * cols;
            plan.sizes.insert(tensor, (rows as usize, cols as usize));
            plan.work += rows * cols;
            let Some(input) = linears.get(tensor.as_str()) else {
                plan.others.push(tensor);
                continue;
            };
            plan.work = plan.work.saturating_add(plan.to_learn(tensor));
            if let (Some(learn), Some(calibration)) = (spec.learn, job.calibration) {
                Learn::check_windows(calibration.windows().len()).map_err(named)?;
                if let Some(done) = model.checkpoint().transforms().first().filter(|_| learn.beside.scale) {
                    return Err(Error::Invalid(format!(
                        "{tensor}: scales cannot be learned of a checkpoint that has a {} already: leave scale out, or begin \
                         with the checkpoint that it was made from",
                        done.name()
                    )));
                }
            }
            if spec.rung == Rung::Gptq {
                let Some(calibration) = job.calibration else {
                    return Err(Error::Invalid(format!("{tensor}: {} goes by a text", spec.rung)));
                };
                // An expert may see few tokens of a long text; all others see each.
                let needed = least_tokens(input.features);
                if calibration.tokens() < needed {
                    return Err(Error::Invalid(format!(
                        "{tensor}: {} calibration tokens say too little of {} columns: give {needed} at least, better {}",
                        calibration.tokens(),
                        input.features,
                        4 * input.features
                    )));
                }
            }
        }
        Ok(plan)
    }

    fn weights(&self, tensor: &str) -> u64 {
        self.sizes.get(tensor).map_or(0, |(rows, cols)| (rows * cols) as u64)
    }

    /// What moments an input's tensors need; none where no tensor goes by a text.
    fn extent(&self, input: &SharedInput) -> Option<Extent> {
        self.job.calibration?;
        let rungs = input.tensors.iter().filter_map(|t| self.job.specs.get(t)).map(|spec| spec.rung);
        match rungs.max()? {
            Rung::Rtn => None,
            Rung::Grid => Some(Extent::Diagonal),
            Rung::Gptq => Some(Extent::Full),
        }
    }

    /// Bits to which an input is quantised before it is multiplied, where all that multiplies it agrees.
    fn activation_bits(&self, input: &SharedInput) -> Option<u8> {
        let bits = |tensor| self.job.specs.get(tensor).and_then(|spec| spec.abq.activation_bits);
        let (first, others) = input.tensors.split_first()?;
        bits(first).filter(|first| others.iter().all(|other| bits(other) == Some(*first)))
    }

    fn tap<'i>(&self, input: &'i SharedInput) -> Tap<'i> {
        Tap { input, bits: self.activation_bits(input) }
    }

    fn goes_by_text(&self, inputs: &[SharedInput]) -> bool {
        inputs.iter().any(|input| self.extent(input).is_some())
    }

    /// The work that is left of a tensor when it is quantised: learning it.
    fn to_learn(&self, tensor: &str) -> u64 {
        let (Some(spec), Some((_, cols))) = (self.job.specs.get(tensor), self.sizes.get(tensor)) else {
            return 0;
        };
        let times = self.text.learning(spec, *cols as u64, self.alone.contains(tensor));
        self.weights(tensor).saturating_mul(times)
    }

    /// How a tensor is learned by itself, where it is.
    fn alone(&self, tensor: &str) -> Option<Alone> {
        let spec = self.job.specs.get(tensor).filter(|_| self.alone.contains(tensor))?;
        let learn = spec.by_layer()?;
        Some(Alone {
            steps: learn.steps(spec.abq.bits, self.text.windows),
            seed: learn.seed,
            effort: self.to_learn(tensor),
        })
    }
}

/// A block in work.
struct Work<'a> {
    plan: &'a Plan<'a>,
    original: Option<&'a Model>,
    last: Option<usize>,
    residuals: Option<Residuals>,
    finished: Vec<Finished>,
    /// Scales that were learned.
    transforms: Vec<Transform>,
    /// What is left to do of learning a sub-layer.
    left: u64,
}

impl Work<'_> {
    /// One block; its new weights are in the model at the end, and the streams past it where a later layer needs them.
    fn block(
        &mut self,
        model: &mut Model,
        inputs: &[SharedInput],
        layer: usize,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let more = self.last.is_some_and(|last| layer < last);
        if self.residuals.as_ref().is_some_and(|residuals| residuals.original.is_some())
            && ![SubLayer::Attention(layer), SubLayer::Mlp(layer)]
                .into_iter()
                .any(|site| each_by_itself(model, site, self.plan.job.specs))
            && let Some(to_learn) = ToLearnBlock::of(model, layer, self.plan.job.learning())
        {
            return self.whole_block((model, inputs), (layer, &to_learn), more, sink);
        }
        for site in [SubLayer::Attention(layer), SubLayer::Mlp(layer)] {
            let of_site =
                inputs.iter().filter(|input| input.sub_layer == site).flat_map(|input| &input.tensors);
            self.left = of_site.fold(0, |sum, tensor| sum.saturating_add(self.plan.to_learn(tensor)));
            self.feed_back(model, inputs, site, sink)?;
            let learned = self.learn(model, site, sink)?;
            if more || site == SubLayer::Attention(layer) {
                self.advance(model, site, (true, !learned))?;
            }
        }
        Ok(())
    }

    /// One block whose sub-layers are learned together, once error feedback has gone over both.
    fn whole_block(
        &mut self,
        (model, inputs): (&mut Model, &[SharedInput]),
        (layer, to_learn): (usize, &ToLearnBlock),
        more: bool,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let room = |name| self.plan.job.room.share(self.plan.job.streams(model), name);
        let (Some(original), Some(residuals)) = (self.original, &mut self.residuals) else { return Ok(()) };
        let mut before = residuals.now.copy(&room("block"))?;
        let mut maps = match &mut residuals.original {
            Some(streams) if to_learn.compares_maps() => Some(streams.copy(&room("maps"))?),
            _ => None,
        };
        let sites = [SubLayer::Attention(layer), SubLayer::Mlp(layer)];
        for site in sites {
            self.feed_back(model, inputs, site, sink)?;
            self.advance(model, site, (site == sites[0], true))?;
        }
        // Once more: the matrices quantise now what they multiply.
        let with_bits = ToLearnBlock::of(model, layer, self.plan.job.learning());
        let to_learn = with_bits.as_ref().unwrap_or(to_learn);
        let Some(Residuals { now, original: Some(targets) }) = &mut self.residuals else { return Ok(()) };
        // They are needed again when the block is learned; until then they hold what the original makes of them.
        now.take(&mut before)?;
        sites.iter().try_for_each(|site| now.advance(original, *site, &mut || ()))?;
        let all = inputs.iter().flat_map(|input| &input.tensors);
        let mut left = all.fold(0u64, |sum, tensor| sum.saturating_add(self.plan.to_learn(tensor)));
        let learned = {
            let mut progress = steps_of(&mut left, to_learn.steps(), sink);
            let streams = StreamsOf { inputs: &mut before, second: now, targets, original: maps.as_mut() };
            to_learn.learn((model, original), streams, &mut self.finished, &mut progress)?
        };
        sink.step(left);
        let of_it = self.finished.iter().filter(|done| to_learn.tensors().contains(&&done.tensor));
        let of_it: Vec<&Finished> = of_it.collect();
        if let Some(lesson) = Lesson::of(sites[0], Taught::Block, &of_it, to_learn.steps()) {
            sink.learned(&lesson);
        }
        if !learned.transforms.is_empty() {
            let all = learned.transforms.iter().chain(self.plan.job.transforms);
            model.transform(all.cloned().collect())?;
            model.fold_layer(layer)?;
            self.transforms = learned.transforms;
        }
        for (tensor, weights, bits) in learned.changed {
            model.replace_quantised(&tensor, weights, bits)?;
        }
        if more {
            now.take(&mut before)?;
            sites.iter().try_for_each(|site| now.advance(model, *site, &mut || ()))?;
        }
        Ok(())
    }

    /// Quantises the matrices of a sub-layer: what it reads first, then what it reads of that.
    fn feed_back(
        &mut self,
        model: &mut Model,
        inputs: &[SharedInput],
        site: SubLayer,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        for first in [true, false] {
            let stage: Vec<&SharedInput> = inputs
                .iter()
                .filter(|input| input.sub_layer == site && reads_first(input.reads) == first)
                .filter(|input| input.tensors.iter().any(|t| self.plan.job.specs.contains_key(t)))
                .collect();
            for batch in batches(self.plan, &stage) {
                self.batch(model, &batch, sink)?;
            }
        }
        Ok(())
    }

    /// Takes the streams past a sub-layer: those of the model, and the original's.
    fn advance(&mut self, model: &Model, site: SubLayer, (now, was): (bool, bool)) -> Result<()> {
        let Some(residuals) = &mut self.residuals else { return Ok(()) };
        if now {
            residuals.now.advance(model, site, &mut || ())?;
        }
        match (&mut residuals.original, self.original) {
            (Some(streams), Some(original)) if was => streams.advance(original, site, &mut || ()),
            _ => Ok(()),
        }
    }

    /// Learns the matrices of a sub-layer together, where that is asked for, from what error feedback made of them. Whether
    /// the original's streams are past it then.
    fn learn(&mut self, model: &mut Model, site: SubLayer, sink: &mut dyn Sink) -> Result<bool> {
        let mut left = std::mem::take(&mut self.left);
        let to_learn = ToLearn::of(model, site, self.plan.job.learning());
        let learned = match (to_learn, self.original, &mut self.residuals) {
            (Some(to_learn), Some(original), Some(Residuals { now, original: Some(targets) })) => {
                targets.advance(original, site, &mut || ())?;
                let streams = (now, targets);
                let changed = {
                    let mut progress = steps_of(&mut left, to_learn.steps(), sink);
                    to_learn.learn(model, original, streams, &mut self.finished, &mut progress)?
                };
                for (tensor, weights, bits) in changed {
                    model.replace_quantised(&tensor, weights, bits)?;
                }
                let of_it = |done: &&Finished| to_learn.tensors().contains(&done.tensor);
                let of_it: Vec<&Finished> = self.finished.iter().filter(of_it).collect();
                if let Some(lesson) = Lesson::of(site, Taught::of(site), &of_it, to_learn.steps()) {
                    sink.learned(&lesson);
                }
                true
            }
            _ => false,
        };
        sink.step(left);
        Ok(learned)
    }

    /// Gathers the moments of some inputs and quantises what multiplies them.
    fn batch(
        &mut self,
        model: &mut Model,
        batch: &[(&SharedInput, Option<Extent>)],
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let known = self.gather(model, batch)?;
        for ((input, _), known) in batch.iter().zip(known) {
            let matrices = input
                .tensors
                .iter()
                .filter_map(|tensor| Some((tensor, *self.plan.job.specs.get(tensor)?)))
                .map(|(tensor, spec)| {
                    let weights = model.weights(tensor)?;
                    let rows = weights.len() / input.features.max(1);
                    let halved = Halved::read(model.checkpoint(), tensor, rows)?;
                    Ok(Matrix {
                        tensor: tensor.clone(),
                        spec,
                        weights,
                        halved,
                        alone: self.plan.alone(tensor),
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            let left = &mut self.left;
            let mut progress = |work: u64| {
                *left = left.saturating_sub(work);
                sink.step(work);
            };
            for (done, weights) in quantise(matrices, input.features, known, &mut progress)? {
                let bits = self.plan.job.specs.get(&done.tensor).and_then(|spec| spec.abq.activation_bits);
                model.replace_quantised(&done.tensor, weights, bits)?;
                sink.step(self.plan.weights(&done.tensor));
                let steps = self.plan.alone(&done.tensor).map_or(0, |alone| alone.steps);
                if let Some(lesson) = Lesson::of(input.sub_layer, Taught::Matrix, &[&done], steps) {
                    sink.learned(&lesson);
                }
                self.finished.push(done);
            }
        }
        Ok(())
    }

    /// What is to be known of each input.
    fn gather(&mut self, model: &Model, batch: &[(&SharedInput, Option<Extent>)]) -> Result<Vec<Input>> {
        let none = || batch.iter().map(|_| Input::default()).collect();
        let Some(residuals) = &mut self.residuals else { return Ok(none()) };
        if let ([(input, _)], Some(original), Some(streams)) = (batch, self.original, &mut residuals.original)
            && self.plan.job.makes_up_for(input)
        {
            let (moments, drift) = residuals.now.moments_and_drift(
                model,
                (original, streams),
                self.plan.tap(input),
                &mut || (),
            )?;
            return Ok(vec![Input { moments: Some(moments), drift: Some(drift.close()) }]);
        }
        let wanted: Vec<(Tap<'_>, Extent)> =
            batch.iter().filter_map(|&(input, extent)| Some((self.plan.tap(input), extent?))).collect();
        if wanted.is_empty() {
            return Ok(none());
        }
        let mut moments = residuals.now.moments(model, &wanted, &mut || ())?.into_iter();
        let of_each = batch.iter().map(|(_, extent)| extent.and_then(|_| moments.next()));
        Ok(of_each.map(|moments| Input { moments, drift: None }).collect())
    }
}

/// Refuses what two of four weights cannot have.
fn two_of_four(spec: &Spec, transforms: &[Transform]) -> Result<()> {
    let what = if let Some(bits) = spec.abq.activation_bits {
        format!(
            "activations of {bits} bits: products from its codes take floating-point ones, leave a{bits} out"
        )
    } else if spec.learn.is_some() {
        "learn: what is learned are all weights of a matrix, leave it out".to_owned()
    } else if transforms.iter().any(|t| !matches!(t, Transform::Quantize { .. })) {
        "rotate and smooth: they were to be folded into it before its zeros were chosen, leave them out"
            .to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Invalid(format!("two of four of its weights are kept, which does not go with {what}")))
}

/// Tells the sink of each of so many steps its share of the work that is left.
fn steps_of<'a>(left: &'a mut u64, steps: u32, sink: &'a mut dyn Sink) -> impl FnMut() + 'a {
    let mut shares = Shares::new(*left, u64::from(steps));
    move || {
        let now = shares.take();
        *left = left.saturating_sub(now);
        sink.step(now);
    }
}

fn reads_first(reads: Reads) -> bool {
    matches!(reads, Reads::Normed | Reads::ExpertTokens(_))
}

/// Inputs whose moments are gathered in one go: as many as fit the memory for Hessians.
fn batches<'i>(plan: &Plan<'_>, inputs: &[&'i SharedInput]) -> Vec<Vec<(&'i SharedInput, Option<Extent>)>> {
    let mut batches: Vec<Vec<_>> = Vec::new();
    let mut bytes = 0u64;
    for &input in inputs {
        let extent = plan.extent(input);
        let more = extent.map_or(0, |extent| Moments::bytes(input.features, extent));
        bytes = bytes.saturating_add(more);
        let alone = plan.job.makes_up_for(input);
        match batches.last_mut().filter(|_| bytes <= plan.job.hessians && !alone) {
            Some(batch) => batch.push((input, extent)),
            None => {
                batches.push(vec![(input, extent)]);
                bytes = more;
            }
        }
    }
    batches
}

/// Tensors that are no linears of a layer, one after the other.
fn others(model: &Model, plan: &Plan<'_>, sink: &mut dyn Sink) -> Result<Vec<Finished>> {
    let (mut finished, folds) = (Vec::new(), model.folds(model.transforms())?);
    for &tensor in &plan.others {
        let (Some(&(rows, cols)), Some(&spec)) = (plan.sizes.get(tensor), plan.job.specs.get(tensor)) else {
            continue;
        };
        let mut weights = read(model.checkpoint(), tensor, rows, cols)?;
        folds.apply(tensor, &mut weights)?;
        let halved = Halved::read(model.checkpoint(), tensor, rows)?;
        let matrix = Matrix { tensor: tensor.to_owned(), spec, weights, halved, alone: None };
        let done = quantise(vec![matrix], cols, Input::default(), &mut |_| ())?;
        finished.extend(done.into_iter().map(|(done, _)| done));
        sink.step(plan.weights(tensor));
    }
    Ok(finished)
}

/// Bytes that are read at a time.
const PIECE: usize = 1 << 22;

/// A whole tensor in single precision.
fn read(checkpoint: &Checkpoint, tensor: &str, rows: usize, cols: usize) -> Result<Vec<f32>> {
    let dtype = checkpoint.tensor(tensor)?.dtype;
    let width = (dtype.bits() as usize / 8).max(1);
    let mut out = Vec::with_capacity(rows * cols);
    let total = rows * cols * width;
    let mut words = vec![0u64; PIECE.min(total).div_ceil(8)];
    for at in (0..total).step_by(PIECE) {
        let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..PIECE.min(total - at)];
        checkpoint.read(tensor, at as u64, bytes)?;
        let from = out.len();
        out.resize(from + bytes.len() / width, 0.0);
        let elements = match dtype {
            Dtype::F32 => bytemuck::try_cast_slice(bytes).ok().map(Elements::F32),
            Dtype::BF16 => bytemuck::try_cast_slice(bytes).ok().map(Elements::Bf16),
            _ => bytemuck::try_cast_slice(bytes).ok().map(Elements::F16),
        };
        if let Some(elements) = elements {
            elements.widen(0, &mut out[from..]);
        }
    }
    Ok(out)
}
