//! The pass: block by block, each on what the sparse blocks before it give out.
//!
//! ```text
//! streams --block as it was--> norms       of all inputs, for Wanda: as its paper has it, and measured better than one by one
//!         --norm--> moments --> q, k, v    new weights in the model
//!         --attention--> moments --> o     so that what follows sees them
//!         --> attention reconstructed      towards the original's stream after it
//!         --attention--> streams           likewise the MLP: gate and up, then down; experts some at a time
//! finished tensors, streams --> sink       then the block's own weights again
//! ```

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use llmpress_calibrate::{
    Calibration, Extent, MOST_COLUMNS, Moments, Residuals, Room, Shares, Tap, least_tokens, named,
    share_of_drift,
};
use llmpress_formats::encoding::abq;
use llmpress_formats::{Dtype, Error, Result};
use llmpress_model::{Model, Reads, SharedInput, SubLayer};

use crate::effort::reconstructing;
use crate::matrix::{Input, Matrix, all_finite, sparsify};
use crate::reconstruct::{ToLearn, why_not};
use crate::report::{Dense, Finished, Lesson};
use crate::{QUAD, Reconstruct, Rule, Sparsifier};

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// How each tensor is to be made sparse: linears of layers; others stay.
    pub hows: &'a BTreeMap<String, Sparsifier>,
    /// The windows to go by; without them what goes by no text runs.
    pub calibration: Option<&'a Calibration>,
    /// Where streams may lie.
    pub room: &'a Room,
    /// Bytes that the Hessians of one sub-layer's experts may take together; one is gathered whatever it takes.
    pub hessians: u64,
}

impl Job<'_> {
    /// Whether the original's streams are kept beside those of the model as it is sparse so far.
    fn keeps_both(&self, model: &Model) -> bool {
        let layers = 0..model.config().layers.len();
        self.calibration.is_some()
            && (self.hows.values().any(|how| how.reconstruct.is_some())
                || layers.flat_map(|layer| model.inputs_of(layer)).any(|input| self.makes_up_for(&input)))
    }

    /// Streams that may be there at a time: 1 where there are none of the original.
    fn streams(&self, model: &Model) -> u64 {
        if self.keeps_both(model) { 2 } else { 1 }
    }

    /// Reads the streams that [`Residuals::save`] wrote in the same job; none where it goes by no text. `path` is for errors.
    ///
    /// # Errors
    /// A file that cannot be read, or is too short.
    pub fn residuals(&self, model: &Model, from: &mut dyn Read, path: &Path) -> Result<Option<Residuals>> {
        let Some(calibration) = self.calibration else { return Ok(None) };
        Residuals::load(model, calibration, (self.room, self.streams(model)), from, path).map(Some)
    }

    /// Whether the weights of an input's tensors make up for what the layers before have lost.
    fn makes_up_for(&self, input: &SharedInput) -> bool {
        let of_expert = matches!(input.reads, Reads::ExpertTokens(_) | Reads::ExpertInner(_));
        let feeds_back =
            |tensor: &String| self.hows.get(tensor).is_some_and(|how| how.rule == Rule::SparseGpt);
        let tokens = self.calibration.map_or(0, Calibration::tokens);
        !of_expert
            && input.features <= MOST_COLUMNS
            && share_of_drift(tokens, input.features) > 0.0
            && input.tensors.iter().any(feeds_back)
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
    /// The weights that there are to be made sparse; the work that this is, 1 for each of them and as much more for one that is
    /// to be reconstructed as that takes longer; and how much of it was finished before.
    fn start(&mut self, weights: u64, work: u64, finished: u64) {
        let _ = (weights, work, finished);
    }

    /// So much more of the work is.
    fn step(&mut self, work: u64) {
        let _ = work;
    }

    /// A sub-layer was reconstructed.
    fn learned(&mut self, lesson: &Lesson) {
        let _ = lesson;
    }

    /// The tensors of a block, from 0, are finished. With `residuals` the job goes on from here: [`State`] of `block + 1`
    /// blocks.
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
    /// Those that stay dense though they were to be made sparse.
    pub dense: Vec<Dense>,
}

/// Makes a model's tensors sparse. The model is as before at the end.
///
/// # Errors
/// A family whose matrices or streams passes do not change, by name; a tensor that is no linear of a layer, or no matrix of floating-point weights; transformations that are not the
/// checkpoint's; a rule that goes by a text without one, or by too short a one; NaN or infinite activations or weights; what
/// cannot be read; what `sink` says.
pub fn run(model: &mut Model, job: Job<'_>, from: State, sink: &mut dyn Sink) -> Result<()> {
    llmpress_calibrate::check_layout(model)?;
    let layers = model.config().layers.len();
    let inputs: Vec<Vec<SharedInput>> = (0..layers).map(|layer| model.inputs_of(layer)).collect();
    let plan = Plan::new(model, job, &inputs)?;
    let done = from.blocks.min(layers);
    let work_of = |blocks: &[Vec<SharedInput>]| -> u64 {
        let tensors = blocks.iter().flatten().flat_map(|input| &input.tensors);
        tensors.fold(0, |sum: u64, tensor| sum.saturating_add(plan.work(tensor)))
    };
    sink.start(plan.weights, work_of(&inputs), work_of(&inputs[..done]));
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
    let original = if both { Some(model.twin()?) } else { None };
    for (layer, inputs) in inputs.iter().enumerate().skip(done) {
        if last.is_none_or(|last| layer > last) {
            residuals = None;
        }
        let mut work = Work {
            plan: &plan,
            original: original.as_ref(),
            last,
            residuals,
            norms: BTreeMap::new(),
            finished: FinishedBlock::default(),
            left: 0,
        };
        let result = work.block(model, inputs, layer, sink);
        let (finished, after) = (work.finished, work.residuals);
        for tensor in inputs.iter().flat_map(|input| &input.tensors) {
            model.restore(tensor)?;
        }
        result?;
        residuals = after;
        let needed = last.is_some_and(|last| layer < last);
        sink.block(layer, finished, residuals.as_mut().filter(|_| needed))?;
    }
    Ok(())
}

/// A matrix of the job.
struct Size {
    dtype: Dtype,
    rows: u64,
    cols: u64,
}

/// A job that was checked against a model.
struct Plan<'a> {
    job: Job<'a>,
    sizes: BTreeMap<&'a str, Size>,
    /// Weights that there are to be made sparse.
    weights: u64,
}

impl<'a> Plan<'a> {
    fn new(model: &Model, job: Job<'a>, inputs: &'a [Vec<SharedInput>]) -> Result<Self> {
        if model.transforms() != model.checkpoint().transforms() {
            return Err(Error::Invalid(
                "a model with transformations that its checkpoint does not have cannot be made sparse: store it first"
                    .to_owned(),
            ));
        }
        let linears: BTreeMap<&str, &SharedInput> = inputs
            .iter()
            .flatten()
            .flat_map(|input| input.tensors.iter().map(move |t| (t.as_str(), input)))
            .collect();
        let mut plan = Self { job, sizes: BTreeMap::new(), weights: 0 };
        for (tensor, how) in job.hows {
            how.check().map_err(|e| named(tensor, e))?;
            let info = model.checkpoint().tensor(tensor)?;
            let Some((rows, cols)) = abq::matrix(&info.shape).filter(|_| abq::DTYPES.contains(&info.dtype))
            else {
                return Err(Error::Invalid(format!(
                    "{tensor}: {} of shape {:?} is no matrix of floating-point weights",
                    info.dtype.name(),
                    info.shape
                )));
            };
            let Some(input) = linears.get(tensor.as_str()) else {
                return Err(Error::Invalid(format!(
                    "{tensor}: is no linear of a layer, and stays dense: embeddings, norms, routers and the head do"
                )));
            };
            plan.sizes.insert(tensor, Size { dtype: info.dtype, rows, cols });
            plan.weights = plan.weights.saturating_add(plan.weights_of(tensor));
            if dense_for(cols).is_some() {
                continue;
            }
            let Some(calibration) = job.calibration else {
                if how.finds_by_text() {
                    return Err(Error::Invalid(format!(
                        "{tensor}: {how} goes by a text: give a calibration text"
                    )));
                }
                continue;
            };
            if how.reconstruct.is_some() {
                Reconstruct::check_windows(calibration.windows().len()).map_err(|e| named(tensor, e))?;
            }
            // An expert may see few tokens of a long text; all others see each.
            let needed = least_tokens(input.features);
            if how.rule == Rule::SparseGpt && calibration.tokens() < needed {
                return Err(Error::Invalid(format!(
                    "{tensor}: {} calibration tokens say too little of {} columns: give {needed} at least, better {}",
                    calibration.tokens(),
                    input.features,
                    4 * input.features
                )));
            }
        }
        Ok(plan)
    }

    /// What is asked for of a tensor that can be made sparse.
    fn how(&self, tensor: &str) -> Option<&Sparsifier> {
        let size = self.sizes.get(tensor).filter(|size| dense_for(size.cols).is_none());
        size.and_then(|_| self.job.hows.get(tensor))
    }

    fn weights_of(&self, tensor: &str) -> u64 {
        self.sizes.get(tensor).map_or(0, |size| size.rows.saturating_mul(size.cols))
    }

    /// All the work that a tensor is.
    fn work(&self, tensor: &str) -> u64 {
        self.weights_of(tensor).saturating_add(self.to_learn(tensor))
    }

    /// The work that is left of a tensor when its masks are found.
    fn to_learn(&self, tensor: &str) -> u64 {
        let (Some(how), Some(size)) = (self.how(tensor), self.sizes.get(tensor)) else { return 0 };
        self.weights_of(tensor).saturating_mul(reconstructing(how, size.cols, self.job.calibration))
    }

    /// What moments an input's tensors need; none where no tensor goes by a text.
    fn extent(&self, input: &SharedInput) -> Option<Extent> {
        self.job.calibration?;
        let of = |how: &Sparsifier| match (how.rule, how.slorb) {
            (Rule::Magnitude, false) => None,
            (Rule::Wanda, false) => Some(false),
            (Rule::SparseGpt, _) | (_, true) => Some(true),
        };
        let full = input.tensors.iter().filter_map(|tensor| self.how(tensor)).filter_map(of).max()?;
        Some(if full { Extent::Full } else { Extent::Diagonal })
    }

    fn goes_by_text(&self, inputs: &[SharedInput]) -> bool {
        let learns = |tensor: &String| self.how(tensor).is_some_and(|how| how.reconstruct.is_some());
        self.job.calibration.is_some()
            && inputs.iter().any(|input| self.extent(input).is_some() || input.tensors.iter().any(learns))
    }
}

/// Why a matrix of so many columns stays dense; none where it need not.
fn dense_for(cols: u64) -> Option<String> {
    (!cols.is_multiple_of(QUAD as u64))
        .then(|| format!("{cols} columns are no multiple of {QUAD}: it stays dense"))
}

/// A block in work.
struct Work<'a> {
    plan: &'a Plan<'a>,
    original: Option<&'a Model>,
    last: Option<usize>,
    residuals: Option<Residuals>,
    /// What each input is in the block before any of it is sparse, by its first tensor, where masks go by that.
    norms: BTreeMap<String, Moments>,
    finished: FinishedBlock,
    /// What is left to do of reconstructing a sub-layer.
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
        self.gather_norms(model, inputs)?;
        for site in [SubLayer::Attention(layer), SubLayer::Mlp(layer)] {
            let of_site = || inputs.iter().filter(|input| input.sub_layer == site);
            let tensors = of_site().flat_map(|input| &input.tensors);
            self.left = tensors.fold(0, |sum, tensor| sum.saturating_add(self.plan.to_learn(tensor)));
            for first in [true, false] {
                let stage: Vec<&SharedInput> =
                    of_site().filter(|input| reads_first(input.reads) == first).collect();
                for batch in batches(self.plan, &stage) {
                    self.batch(model, &batch, sink)?;
                }
            }
            let learned = self.reconstruct(model, site, sink)?;
            if more || site == SubLayer::Attention(layer) {
                self.advance(model, site, !learned)?;
            }
        }
        Ok(())
    }

    /// Gathers what all inputs of Wanda's matrices are while the block is as it was.
    fn gather_norms(&mut self, model: &Model, inputs: &[SharedInput]) -> Result<()> {
        let Some(residuals) = &mut self.residuals else { return Ok(()) };
        let by_norms = |tensor: &String| self.plan.how(tensor).is_some_and(|how| how.rule == Rule::Wanda);
        let wanted: Vec<(Tap<'_>, Extent)> = inputs
            .iter()
            .filter(|input| input.tensors.iter().any(by_norms))
            .map(|input| (Tap::from(input), Extent::Diagonal))
            .collect();
        let gathered = residuals.now.moments(model, &wanted, &mut || ());
        let moments = match gathered {
            Ok(moments) => moments,
            Err(error) => {
                // Weights that are no numbers are why: those are to be named.
                for tensor in inputs.iter().flat_map(|input| &input.tensors) {
                    if self.plan.how(tensor).is_some() {
                        all_finite(tensor, &model.weights(tensor)?)?;
                    }
                }
                return Err(error);
            }
        };
        let first = |(tap, _): (Tap<'_>, Extent)| tap.input.tensors.first().cloned().unwrap_or_default();
        self.norms = wanted.into_iter().map(first).zip(moments).collect();
        Ok(())
    }

    /// Takes the streams past a sub-layer: those of the model, and the original's.
    fn advance(&mut self, model: &Model, site: SubLayer, original: bool) -> Result<()> {
        let Some(residuals) = &mut self.residuals else { return Ok(()) };
        residuals.now.advance(model, site, &mut || ())?;
        match (&mut residuals.original, self.original) {
            (Some(streams), Some(model)) if original => streams.advance(model, site, &mut || ()),
            _ => Ok(()),
        }
    }

    /// Reconstructs a sub-layer, where that is asked for. Whether the original's streams are past it then.
    fn reconstruct(&mut self, model: &mut Model, site: SubLayer, sink: &mut dyn Sink) -> Result<bool> {
        let mut left = std::mem::take(&mut self.left);
        let to_learn = ToLearn::of(model, site, self.plan.job.hows);
        let learned = match (to_learn, self.original, &mut self.residuals) {
            (Some(to_learn), Some(original), Some(Residuals { now, original: Some(targets) })) => {
                targets.advance(original, site, &mut || ())?;
                let lesson = {
                    let mut shares = Shares::new(left, u64::from(to_learn.steps()));
                    let mut progress = || {
                        let now = shares.take();
                        left = left.saturating_sub(now);
                        sink.step(now);
                    };
                    let finished = &mut self.finished.tensors;
                    to_learn.learn(model, (now, targets), finished, &mut progress)?
                };
                if let Some(lesson) = lesson {
                    for tensor in lesson.tensors.iter().filter(|_| lesson.reconstructed.taken) {
                        if let Some(done) = self.finished.tensors.iter().find(|done| done.tensor == *tensor) {
                            model.replace(tensor, done.product())?;
                        }
                    }
                    sink.learned(&lesson);
                }
                true
            }
            _ => false,
        };
        if let Some(why) = why_not(model, site) {
            let asked = |tensor: &str| self.plan.how(tensor).is_some_and(|how| how.reconstruct.is_some());
            for done in self.finished.tensors.iter_mut().filter(|done| done.report.unlearned.is_none()) {
                if done.report.reconstructed.is_none() && asked(&done.tensor) {
                    done.report.unlearned = Some(why.clone());
                }
            }
        }
        sink.step(left);
        Ok(learned)
    }

    /// Gathers the moments of some inputs and makes what multiplies them sparse.
    fn batch(
        &mut self,
        model: &mut Model,
        batch: &[(&SharedInput, Option<Extent>)],
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let known = self.gather(model, batch)?;
        for ((input, _), known) in batch.iter().zip(known) {
            let mut matrices = Vec::new();
            for tensor in &input.tensors {
                let Some(size) = self.plan.sizes.get(tensor.as_str()) else { continue };
                if let Some(why) = dense_for(size.cols) {
                    self.finished.dense.push(Dense { tensor: tensor.clone(), why });
                    sink.step(self.plan.weights_of(tensor));
                } else if let Some(&how) = self.plan.how(tensor) {
                    let (tensor, weights) = (tensor.clone(), model.weights(tensor)?);
                    matrices.push(Matrix { tensor, dtype: size.dtype, how, weights });
                }
            }
            for done in sparsify(matrices, input.features, known)? {
                model.replace(&done.tensor, done.product())?;
                sink.step(self.plan.weights_of(&done.tensor));
                self.finished.tensors.push(done);
            }
        }
        Ok(())
    }

    /// What is to be known of each input.
    fn gather(&mut self, model: &Model, batch: &[(&SharedInput, Option<Extent>)]) -> Result<Vec<Input>> {
        let Some(residuals) = &mut self.residuals else {
            return Ok(batch.iter().map(|_| Input::default()).collect());
        };
        let mut norms: Vec<Option<Moments>> = batch
            .iter()
            .map(|(input, _)| input.tensors.first().and_then(|first| self.norms.remove(first)))
            .collect();
        if let ([(input, Some(Extent::Full))], Some(original), Some(streams)) =
            (batch, self.original, &mut residuals.original)
            && self.plan.job.makes_up_for(input)
        {
            let (moments, drift) =
                residuals.now.moments_and_drift(model, (original, streams), Tap::from(*input), &mut || ())?;
            let norms = norms.pop().flatten();
            return Ok(vec![Input { moments: Some(moments), drift: Some(drift.close()), norms }]);
        }
        // Where squares alone are needed they are there.
        let full = |extent: Option<Extent>| extent == Some(Extent::Full);
        let wanted = batch.iter().filter(|(_, extent)| full(*extent));
        let wanted: Vec<_> = wanted.map(|&(input, _)| (Tap::from(input), Extent::Full)).collect();
        let mut moments = residuals.now.moments(model, &wanted, &mut || ())?.into_iter();
        let of_each = batch.iter().zip(norms).map(|((_, extent), norms)| match full(*extent) {
            true => Input { moments: moments.next(), drift: None, norms },
            false => Input { moments: norms, drift: None, norms: None },
        });
        Ok(of_each.collect())
    }
}

fn reads_first(reads: Reads) -> bool {
    matches!(reads, Reads::Normed | Reads::ExpertTokens(_))
}

/// Inputs whose moments are gathered in one go: as many as fit the memory for Hessians. Without those of no tensor of the job.
fn batches<'i>(plan: &Plan<'_>, inputs: &[&'i SharedInput]) -> Vec<Vec<(&'i SharedInput, Option<Extent>)>> {
    let mut batches: Vec<Vec<_>> = Vec::new();
    let mut bytes = 0u64;
    for &input in inputs {
        if !input.tensors.iter().any(|tensor| plan.sizes.contains_key(tensor.as_str())) {
            continue;
        }
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
