//! Working out the passes of a recipe, one after the other, each on the view that those before it leave.
//!
//! ```text
//! view 0 (source) --ranking 1--> view 1 --ranking 2--> view 2 ...     rankings: kept, resumed, published
//! view n --sparsifier, quantiser--> finished units, kept block by block --> view n + 1
//! view n (the teacher) --sparsifier--> view n + 1 --training--> finished units --> view n + 2
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Texts};
use llmpress_formats::{
    Base, Checkpoint, Digest, Encoding, Manifest, Removal, ShardFile, Tensor, Transform, UnitEntry,
};
use llmpress_model::{Model, Tokenizer, folded};
use llmpress_prune::{self as prune, PRUNING_FILE, Ranking};
use llmpress_quantize::{Learn, Spec};
use llmpress_sparsify::Reconstruct;
use llmpress_sparsify::ast::Text;

use crate::blocks::{Blocks, FORMS_FILE};
use crate::fingerprint::fingerprint;
use crate::foreseen::Foreseen;
use crate::method::room::Fit;
use crate::pass::{Pass, apply};
use crate::progress::{Counted, Progress, Task, Watch};
use crate::quantise::{
    Assigned, Run, check_sparse, check_whole_fits, expected_bytes, expected_sparse_bytes,
    forecast as forecast_of_quantiser, is_sparse, record_files, run, sparse_of_view, targets,
};
use crate::recipe::Compiled;
use crate::sparsify::{self, Choices};
use crate::stage::Stage;
use crate::train;
use crate::{
    Ast, CalibrationRecord, Error, Method, PassForecast, Quantised, Quantiser, Recipe, Result, Sparsified,
    Sparsifier, Trained, recorded_passes, view,
};

/// What passes go by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CalibrationText {
    /// The texts.
    pub texts: Texts,
    /// How many windows; each pass knows how many it needs where nobody says.
    pub windows: Option<usize>,
    /// Tokens of a window.
    pub length: usize,
    /// Draws the windows by chance.
    pub seed: Option<u64>,
}

impl CalibrationText {
    /// Tokens of a window where nobody says.
    pub const LENGTH: usize = 256;

    /// Of so many windows where nobody says how many.
    pub(crate) fn cut(&self, windows: usize) -> Cut {
        Cut { windows: self.windows.unwrap_or(windows), length: self.length, seed: self.seed }
    }
}

impl Default for CalibrationText {
    fn default() -> Self {
        Self { texts: Texts { files: Vec::new() }, windows: None, length: Self::LENGTH, seed: None }
    }
}

/// What is asked for: a recipe, and what its passes go by.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The recipe.
    pub recipe: Recipe,
    /// What calibrated passes judge by; no files where there is no text.
    pub calibration: CalibrationText,
    /// Saved rankings to use instead, for the calibrated passes in order.
    pub rankings: Vec<PathBuf>,
    /// The checkpoint by which what is archived is stored, as its difference from it.
    pub base: Option<PathBuf>,
}

impl Request {
    /// A recipe whose passes need nothing.
    pub fn new(recipe: Recipe) -> Self {
        Self { recipe, calibration: CalibrationText::default(), rankings: Vec::new(), base: None }
    }

    /// The saved rankings that do not say which model they were made of: nobody can tell whether they fit.
    ///
    /// # Errors
    /// A file that cannot be read, or is no ranking.
    pub fn unmarked_rankings(&self) -> Result<Vec<&Path>> {
        let mut unmarked = Vec::new();
        for path in &self.rankings {
            if Ranking::read(path)?.model.is_none() {
                unmarked.push(path.as_path());
            }
        }
        Ok(unmarked)
    }

    /// A view of the source, to be stored by the base where there is one.
    fn on_base(&self, view: Checkpoint) -> Result<Checkpoint> {
        Ok(match &self.base {
            Some(base) => view.to_store_by(Base::open(base)?),
            None => view,
        })
    }

    /// Refuses what nothing would be done with.
    pub(crate) fn check(&self) -> Result<()> {
        if self.base.is_some() && (self.recipe.to != Method::Archive || !self.recipe.passes.is_empty()) {
            return Err(Error::Invalid(
                "--base is for --to archive, which stores a fine-tune as its difference from its base, and for no pass before it".into(),
            ));
        }
        let calibrated = |pass: &&Pass| matches!(pass, Pass::Prune(pass) if pass.calibrated());
        let count = self.recipe.passes.iter().filter(calibrated).count();
        let by_rules = self
            .recipe
            .rules
            .iter()
            .any(|rule| matches!(rule.to, crate::Target::Quantise(quantiser) if quantiser.takes_text()));
        let takes_text = by_rules || self.recipe.passes.iter().any(Pass::takes_text);
        if !takes_text && !self.calibration.texts.files.is_empty() || count == 0 && !self.rankings.is_empty()
        {
            return Err(Error::Invalid(
                "--calib is for prunings that judge and for what goes by a text (--to drop:..., finercut:..., sparse24:wanda, \
                 ast:..., grid:..., gptq:...), --ranking for prunings alone"
                    .into(),
            ));
        }
        let mut quantisers = self.recipe.quantisers();
        if let Some(learning) = quantisers.find(|quantiser| quantiser.spec.learn.is_some())
            && !self.calibration.texts.files.is_empty()
        {
            Learn::check_windows(self.calibration.cut(Quantiser::WINDOWS).windows)
                .map_err(|e| Error::Invalid(format!("{learning}: {e}")))?;
        }
        let reconstructs = |pass: &&Pass| matches!(pass, Pass::Sparsify(how) if how.reconstruct.is_some());
        if let Some(pass) = self.recipe.passes.iter().find(reconstructs)
            && !self.calibration.texts.files.is_empty()
        {
            Reconstruct::check_windows(self.calibration.cut(Quantiser::WINDOWS).windows)
                .map_err(|e| Error::Invalid(format!("{pass}: {e}")))?;
        }
        let others =
            by_rules || self.recipe.passes.iter().any(|pass| pass.takes_text() && !calibrated(&pass));
        if count > 0 && !others && self.rankings.len() == count && !self.calibration.texts.files.is_empty() {
            return Err(Error::Invalid(
                "every pass has a --ranking already: leave out --calib, or the rankings".into(),
            ));
        }
        if self.rankings.len() > count {
            return Err(Error::Invalid(format!(
                "{} rankings are given, and {count} passes go by one",
                self.rankings.len()
            )));
        }
        Ok(())
    }
}

/// A chain whose passes say what they do.
pub(crate) struct Settled {
    /// The recipe, every pass settled.
    pub(crate) recipe: Recipe,
    /// The source as the passes leave it.
    pub(crate) view: Checkpoint,
    /// The rankings, and the record of learning, as files of the output.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

/// Where the passes of a job find what earlier runs came to.
pub(crate) struct Earlier<'a> {
    pub(crate) stage: Option<&'a Stage>,
    /// A finished output of what may be the same job.
    pub(crate) finished: Option<&'a Path>,
    /// Whether what is there is to be replaced.
    pub(crate) force: bool,
    /// Most memory to use, in bytes.
    pub(crate) memory: Option<u64>,
}

/// The units of a pass that has run.
enum Made {
    /// In its stage.
    Blocks(Blocks),
    /// In a finished output of the same job.
    Output(PathBuf),
}

impl Made {
    /// The record of learning, as files; a finished output has its own.
    fn record(&self, of: &Pass) -> Result<BTreeMap<String, Vec<u8>>> {
        match (self, of) {
            (Self::Blocks(blocks), Pass::Sparsified(_)) => {
                sparsify::record_files(blocks.recall(FORMS_FILE).unwrap_or_default(), blocks.lessons()?)
            }
            (Self::Blocks(blocks), Pass::Trained(done)) if done.to.blockwise => {
                train::of_sub_layers(&blocks.lessons()?)
            }
            (Self::Blocks(blocks), Pass::Trained(_)) => train::record_files(&blocks.lessons()?),
            (Self::Blocks(blocks), _) => record_files(blocks.lessons()?),
            (Self::Output(_), _) => Ok(BTreeMap::new()),
        }
    }

    /// What its weights got before, or with it.
    fn transforms(&self) -> Result<Vec<Transform>> {
        match self {
            Self::Blocks(blocks) => blocks.all_transforms(),
            Self::Output(out) => Ok(Checkpoint::open(out)?.transforms().to_vec()),
        }
    }

    fn view(&self, checkpoint: Checkpoint, of: &Pass) -> Result<Checkpoint> {
        match (self, of) {
            (Self::Blocks(blocks), _) => blocks.view(checkpoint),
            (Self::Output(out), Pass::Sparsified(_)) => {
                units_of_output(checkpoint, out, |_, encoding| is_sparse(encoding))
            }
            (Self::Output(out), Pass::Trained(_)) => {
                units_of_output(checkpoint, out, |name, encoding| is_sparse(encoding) || train::is_norm(name))
            }
            (Self::Output(out), _) => units_of_output(checkpoint, out, |_, encoding| encoding.is_lossy()),
        }
    }
}

/// The source after passes, of which some made units.
fn view_after(source: Checkpoint, passes: &[Pass], made: &[Option<Made>]) -> Result<Checkpoint> {
    let made = made.iter().map(Option::as_ref).chain(std::iter::repeat(None));
    passes.iter().zip(made).try_fold(source, |checkpoint, (pass, made)| match made {
        Some(made) => made.view(checkpoint, pass),
        None => apply(checkpoint, pass),
    })
}

/// A view with such units of a finished output in place of its tensors.
fn units_of_output(
    checkpoint: Checkpoint,
    out: &Path,
    wanted: impl Fn(&str, &Encoding) -> bool,
) -> Result<Checkpoint> {
    let done = Checkpoint::open(out)?;
    let manifest =
        done.manifest().ok_or_else(|| Error::Invalid(format!("{}: has no manifest", out.display())))?;
    // Another pass of the same output may have had them already.
    let has_them = checkpoint.transforms() == done.transforms();
    let mut view = if has_them { checkpoint } else { folded(checkpoint, done.transforms().to_vec())? };
    for shard in done.directory().shards() {
        let here = |unit: &UnitEntry| {
            unit.components.values().all(|link| shard.header().get(&link.tensor).is_some())
        };
        let wanted = |name: &String| done.units().get(name).is_some_and(|u| wanted(name, u.encoding()));
        let units = manifest.units.iter().filter(|(name, unit)| wanted(name) && here(unit));
        let units: BTreeMap<String, UnitEntry> = units.map(|(n, u)| (n.clone(), u.clone())).collect();
        if !units.is_empty() {
            view = view.with_finished(ShardFile::open(shard.path())?, &units)?;
        }
    }
    Ok(view)
}

/// Works out every pass.
pub(crate) fn settle(
    dir: &Path,
    request: &Request,
    earlier: &Earlier<'_>,
    watch: &dyn Watch,
) -> Result<Settled> {
    request.check()?;
    // Passes leave no names that were not there before.
    request.recipe.compile()?.check_used(&request.recipe.open(dir)?)?;
    let mut recipe = Recipe { passes: Vec::new(), ..request.recipe.clone() };
    let mut files = BTreeMap::new();
    let mut text = None;
    for pass in &request.recipe.passes {
        if let Pass::Train(settings) = pass {
            text = Some(train::text(request.recipe.open(dir)?, &request.calibration.texts, settings)?);
        }
    }
    let mut rankings = request.rankings.iter();
    let (mut made, mut ranked): (Vec<Option<Made>>, usize) = (Vec::new(), 0);
    for (index, pass) in request.recipe.passes.iter().enumerate() {
        let number = index + 1;
        let pruning = match pass {
            Pass::Remove(_) => {
                recipe.passes.push(pass.clone());
                made.push(None);
                continue;
            }
            Pass::Sparsify(_) | Pass::Train(_) | Pass::Quantise(_) => {
                let before = view_after(request.recipe.open(dir)?, &recipe.passes, &made)?;
                let step = Finishing { number, recipe: &recipe, request, earlier };
                let (done, units) = match pass {
                    Pass::Quantise(quantiser) => {
                        let again = || view_after(request.recipe.open(dir)?, &recipe.passes, &made);
                        let quantising = Quantising { step, quantiser: *quantiser, again: &again };
                        let (done, units) = quantising.run(before, watch)?;
                        (Pass::Quantised(done), units)
                    }
                    Pass::Sparsify(sparsifier) => {
                        let later = &request.recipe.passes[number..];
                        let step = Sparsifying { step, sparsifier: *sparsifier, later };
                        let (done, units) = step.run(before, watch)?;
                        (Pass::Sparsified(done), units)
                    }
                    Pass::Train(settings) => {
                        // What the pass before it made 2:4.
                        let last = recipe.passes.len().saturating_sub(1);
                        let source = request.recipe.open(dir)?;
                        let dense = view_after(source, &recipe.passes[..last], &made[..last])?;
                        let dense = match made.last() {
                            Some(Some(units)) => folded(dense, units.transforms()?)?,
                            _ => dense,
                        };
                        let Some(text) = &text else { continue };
                        let training = Training { step, settings: *settings };
                        let (done, units) = training.run(dense, &before, text, watch)?;
                        (Pass::Trained(done), units)
                    }
                    _ => continue,
                };
                files.extend(units.record(&done)?);
                made.push(Some(units));
                recipe.passes.push(done);
                continue;
            }
            Pass::Sparsified(done) => {
                return Err(Error::Invalid(format!(
                    "{} has run where this recipe comes from: ask for it by its name, \"{}\"",
                    done.to, done.to
                )));
            }
            Pass::Trained(done) => {
                return Err(Error::Invalid(format!(
                    "{} has run where this recipe comes from: ask for it by its name, \"{}\"",
                    done.to, done.to
                )));
            }
            Pass::Quantised(done) => {
                return Err(Error::Invalid(format!(
                    "{} has run where this recipe comes from: ask for it by its name, \"{}\"",
                    done.to, done.to
                )));
            }
            Pass::Prune(pruning) => pruning,
        };
        let given = if pruning.calibrated() { rankings.next() } else { None };
        let before = view_after(request.recipe.open(dir)?, &recipe.passes, &made)?;
        let mark = Mark { number, name: file_name(ranked), recipe: &recipe, request };
        let model = Model::open(Arc::new(before))?;
        let ranking = match given {
            Some(path) => saved(path, pruning, &model)?,
            None => mark.rank(&model, pruning, earlier, watch)?,
        };
        let removal = ranking.removal(pruning.count(&ranking)?, pruning.portable)?;
        files.insert(mark.name, ranking.to_json()?);
        ranked += 1;
        recipe.passes.push(Pass::Remove(removal));
        made.push(None);
    }
    let view = request.on_base(view_after(request.recipe.open(dir)?, &recipe.passes, &made)?)?;
    Ok(Settled { recipe, view, files })
}

/// The place in the chain of a pass that finishes units.
#[derive(Clone, Copy)]
struct Finishing<'a> {
    number: usize,
    /// The passes before it.
    recipe: &'a Recipe,
    request: &'a Request,
    earlier: &'a Earlier<'a>,
}

impl Finishing<'_> {
    /// The finished output whose units are this pass's, and the pass as it was recorded there, if there is one that counts.
    ///
    /// # Errors
    /// One that another pass made.
    fn output(&self, is_this: impl Fn(&Pass) -> bool) -> Result<Option<(Made, Pass)>> {
        let Some(out) = self.earlier.finished.filter(|_| !self.earlier.force) else { return Ok(None) };
        let recipe = Manifest::read(out)?.map(|manifest| manifest.recipe).unwrap_or_default();
        // Whether all else is the same is looked at later.
        let recorded = recorded_passes(&recipe)?.into_iter().nth(self.number - 1);
        if let Some(recorded) = recorded.filter(is_this) {
            return Ok(Some((Made::Output(out.to_owned()), recorded)));
        }
        Err(Error::Output {
            path: out.to_owned(),
            what: "already holds a checkpoint, made by another recipe: use --force to replace it, or choose \
                   another output directory"
                .to_owned(),
        })
    }

    /// The finished blocks of a job of this identity.
    fn blocks(&self, pass: &dyn std::fmt::Display, identity: &str) -> Result<Blocks> {
        let stage = self.earlier.stage;
        let stage =
            stage.ok_or_else(|| Error::Invalid(format!("{pass}: there is no place for what it finishes")))?;
        Blocks::open(&stage.folder(self.number)?, &Digest::of(identity.as_bytes()).to_string())
    }
}

/// What was gone by, for the record.
fn record_of(calibration: Option<&Calibration>) -> Option<CalibrationRecord> {
    calibration.map(|calibration| CalibrationRecord {
        windows: calibration.windows().len(),
        window: calibration.length(),
        digest: calibration.digest(),
    })
}

/// What makes matrices 2:4, and its place in the chain.
struct Sparsifying<'a> {
    step: Finishing<'a>,
    sparsifier: Sparsifier,
    /// The passes after it.
    later: &'a [Pass],
}

impl Sparsifying<'_> {
    /// Runs what is left of it.
    fn run(&self, before: Checkpoint, watch: &dyn Watch) -> Result<(Sparsified, Made)> {
        let request = self.step.request;
        let rules = request.recipe.compile()?;
        let tensors = sparsify::targets(&before, &rules)?;
        let choices = Choices::of(&self.sparsifier, &tensors, &rules, self.later);
        choices.as_ref().map_or(Ok(()), |choices| choices.check(&before))?;
        let before_it = fingerprint(&before, self.step.recipe, 0)?;
        let before = Arc::new(before);
        let calibration = match self.sparsifier.needs_text() {
            false => None,
            true if request.calibration.texts.files.is_empty() => {
                return Err(Error::Invalid(format!(
                    "{} goes by what the model reads: give a text with --calib",
                    self.sparsifier
                )));
            }
            true => {
                let vocab = Model::open(before.clone())?.vocab_size();
                let tokenizer = Tokenizer::open(before.root())?;
                let text = &request.calibration;
                Some(text.texts.calibration(&tokenizer, vocab, text.cut(Quantiser::WINDOWS))?)
            }
        };
        let done = Sparsified::new(self.sparsifier, record_of(calibration.as_ref()));
        // What it settled there is what it would settle here.
        let is_this = |pass: &Pass| matches!(pass, Pass::Sparsified(other) if other.to == done.to && other.calibration == done.calibration);
        if let Some((made, Pass::Sparsified(recorded))) = self.step.output(is_this)? {
            return Ok((recorded, made));
        }
        let digest = calibration.as_ref().map(Calibration::digest).unwrap_or_default();
        let names: Vec<&str> = tensors.iter().map(String::as_str).collect();
        let chosen = choices.as_ref().map(Choices::identity).unwrap_or_default();
        let identity = format!("{before_it}\n{digest}\n{}\n{}\n{chosen}", self.sparsifier, names.join("\n"));
        let mut blocks = self.step.blocks(&self.sparsifier, &identity)?;
        let pass = sparsify::Run {
            tensors: &tensors,
            how: self.sparsifier,
            choices: choices.as_ref(),
            calibration: calibration.as_ref(),
            memory: self.step.earlier.memory,
        };
        let settled = sparsify::run(before, &pass, &mut blocks, watch)?;
        Ok((done.with(&settled), Made::Blocks(blocks)))
    }
}

/// What trains, and its place in the chain.
struct Training<'a> {
    step: Finishing<'a>,
    settings: Ast,
}

impl Training<'_> {
    /// Runs what is left of it. `dense` is what was made 2:4.
    fn run(
        &self,
        dense: Checkpoint,
        before: &Checkpoint,
        text: &Text,
        watch: &dyn Watch,
    ) -> Result<(Trained, Made)> {
        let settings = self.settings;
        let before_it = fingerprint(before, self.step.recipe, 0)?;
        let done = Trained { to: settings, text: Some(train::record_of(text)) };
        let is_this = |pass: &Pass| matches!(pass, Pass::Trained(other) if *other == done);
        if let Some((made, _)) = self.step.output(is_this)? {
            return Ok((done, made));
        }
        let identity = format!("{before_it}\n{}\n{settings}", text.digest());
        let mut blocks = self.step.blocks(&settings, &identity)?;
        let (dense, memory) = (Arc::new(dense), self.step.earlier.memory);
        train::run(&train::Run { dense, before, text, settings, memory }, &mut blocks, watch)?;
        Ok((done, Made::Blocks(blocks)))
    }
}

/// A quantiser and its place in the chain.
struct Quantising<'a> {
    step: Finishing<'a>,
    quantiser: Quantiser,
    /// What it quantises, once more.
    again: &'a dyn Fn() -> Result<Checkpoint>,
}

impl Quantising<'_> {
    /// Runs what is left of it.
    fn run(&self, before: Checkpoint, watch: &dyn Watch) -> Result<(Quantised, Made)> {
        let Finishing { recipe, request, earlier, .. } = self.step;
        let rules = request.recipe.compile()?;
        let mut specs = targets(&before, self.quantiser.spec, &rules)?;
        for pass in &recipe.passes {
            if let Pass::Sparsified(done) = pass {
                specs.retain(|name, _| !done.unquantised.contains(name));
            }
        }
        let assigned = Assigned::of(&self.quantiser, &specs, &rules);
        let before_it = fingerprint(&before, recipe, 0)?;
        let before = Arc::new(before);
        let sparse = sparse_of_view(&before, &specs)?;
        check_sparse(&self.quantiser, &specs, &sparse)?;
        let calibration = self.calibration(&before, &specs)?;
        let done = Quantised { to: self.quantiser, calibration: record_of(calibration.as_ref()) };
        let is_this = |pass: &Pass| matches!(pass, Pass::Quantised(other) if *other == done);
        if let Some((made, _)) = self.step.output(is_this)? {
            return Ok((done, made));
        }
        let digest = calibration.as_ref().map(Calibration::digest).unwrap_or_default();
        let with = self.quantiser.with;
        let specs_text: Vec<String> =
            specs.iter().map(|(name, s)| format!("{name} {}", Quantiser::of(*s))).collect();
        let identity = format!("{before_it}\n{digest}\n{}\n{}", self.quantiser, specs_text.join("\n"));
        let window = calibration.as_ref().map_or(0, Calibration::length);
        check_whole_fits(&before, &specs, window, earlier.memory)?;
        let mut blocks = self.step.blocks(&self.quantiser, &identity)?;
        let pass = Run {
            specs: &specs,
            assigned: assigned.as_ref(),
            with,
            calibration: calibration.as_ref(),
            memory: earlier.memory,
            again: self.again,
        };
        run(before, &pass, &mut blocks, watch)?;
        Ok((done, Made::Blocks(blocks)))
    }

    fn calibration(
        &self,
        before: &Arc<Checkpoint>,
        specs: &BTreeMap<String, Spec>,
    ) -> Result<Option<Calibration>> {
        let by_text: Vec<(&String, Quantiser)> = specs
            .iter()
            .map(|(name, spec)| (name, Quantiser::of(*spec)))
            .filter(|(_, q)| q.takes_text())
            .collect();
        let text = &self.step.request.calibration;
        let of_model = self.quantiser.with.smooth || self.quantiser.mean.is_some();
        if by_text.is_empty() && !of_model {
            return Ok(None);
        }
        if text.texts.files.is_empty() {
            if of_model {
                return Err(Error::Invalid(format!(
                    "{}: smooth and a mean of bits go by what the model reads: give a text with --calib",
                    self.quantiser
                )));
            }
            return match by_text.iter().find(|(_, quantiser)| quantiser.needs_text()) {
                Some((name, quantiser)) => Err(Error::Invalid(format!(
                    "{name}: {quantiser} goes by what the model reads: give a text with --calib"
                ))),
                None => Ok(None),
            };
        }
        let vocab = runs(before, &self.quantiser)?.vocab_size();
        let tokenizer = Tokenizer::open(before.root())?;
        Ok(Some(text.texts.calibration(&tokenizer, vocab, text.cut(Quantiser::WINDOWS))?))
    }
}

/// A model that a quantiser goes by; where it does not run, the error says what goes by none.
fn runs(checkpoint: &Arc<Checkpoint>, quantiser: &Quantiser) -> Result<Model> {
    use llmpress_formats::Error::Unsupported;
    Model::open(checkpoint.clone()).map_err(|e| match e {
        Unsupported { path, tensor, what } => Error::Format(Unsupported {
            path,
            tensor,
            what: format!(
                "{what}. {quantiser} goes by what the model reads, so it must run here: rtn:... quantises any architecture, and \
                 so does grid:... without --calib"
            ),
        }),
        e => e.into(),
    })
}

/// What a pass's ranking is called among the files of the output, after `before` others.
fn file_name(before: usize) -> String {
    match (before, PRUNING_FILE.split_once('.')) {
        (1.., Some((stem, extension))) => format!("{stem}-{}.{extension}", before + 1),
        _ => PRUNING_FILE.to_owned(),
    }
}

/// A ranking that somebody saved.
fn saved(path: &Path, pass: &prune::Pass, model: &Model) -> Result<Ranking> {
    let ranking = Ranking::read(path)?;
    ranking.check(model)?;
    if ranking.method != pass.ranking_name() {
        return Err(Error::Invalid(format!(
            "{} ranks by {}, not by {}",
            path.display(),
            ranking.method,
            pass.ranking_name()
        )));
    }
    Ok(ranking)
}

/// The calibration of a model, if a pass needs one.
pub(crate) fn calibration(
    model: &Model,
    pass: &prune::Pass,
    text: &CalibrationText,
) -> Result<Option<Calibration>> {
    if !pass.calibrated() {
        return Ok(None);
    }
    if text.texts.files.is_empty() {
        return Err(Error::Invalid(format!(
            "{} judges sub-layers by a text: give one with --calib",
            pass.ranking_name()
        )));
    }
    let tokenizer = Tokenizer::open(model.checkpoint().root())?;
    Ok(Some(text.texts.calibration(&tokenizer, model.vocab_size(), text.cut(pass.default_windows()))?))
}

/// A pass and its place in the chain.
struct Mark<'a> {
    number: usize,
    name: String,
    /// The passes before it.
    recipe: &'a Recipe,
    request: &'a Request,
}

impl Mark<'_> {
    fn rank(
        &self,
        model: &Model,
        pass: &prune::Pass,
        earlier: &Earlier<'_>,
        watch: &dyn Watch,
    ) -> Result<Ranking> {
        let calibration = calibration(model, pass, &self.request.calibration)?;
        if let Some(done) = earlier.finished.and_then(|out| Ranking::read(&out.join(&self.name)).ok())
            && done.answers(pass, model, calibration.as_ref())?
        {
            return Ok(done);
        }
        let digest = calibration.as_ref().map(Calibration::digest).unwrap_or_default();
        let source = fingerprint(model.checkpoint(), self.recipe, 0)?;
        let fingerprint = format!("{source} {digest} {}", pass.ranking_name());
        let found = earlier.stage.and_then(|stage| stage.read(self.number, &fingerprint));
        if let Some(found) = &found
            && found.answers(pass, model, calibration.as_ref())?
        {
            return Ok(found.clone());
        }
        let mut save = |ranking: &Ranking| match earlier.stage {
            Some(stage) => stage.write(self.number, &fingerprint, ranking),
            None => Ok(()),
        };
        let ranking = rank(model, pass, calibration.as_ref(), found, watch, &mut save)?;
        save(&ranking)?;
        Ok(ranking)
    }
}

/// Ranks a model's sub-layers while somebody watches.
pub(crate) fn rank(
    model: &Model,
    pass: &prune::Pass,
    calibration: Option<&Calibration>,
    found: Option<Ranking>,
    watch: &dyn Watch,
    save: &mut dyn FnMut(&Ranking) -> llmpress_formats::Result<()>,
) -> Result<Ranking> {
    let mut shown = Shown { watch, progress: None, save };
    Ok(pass.rank(model, calibration, found, &mut shown)?)
}

/// Passes on what a ranking says of itself.
struct Shown<'a> {
    watch: &'a dyn Watch,
    progress: Option<Box<dyn Progress + 'a>>,
    save: &'a mut dyn FnMut(&Ranking) -> llmpress_formats::Result<()>,
}

impl prune::Watch for Shown<'_> {
    fn start(&mut self, total: u64, counted: prune::Counted) {
        let counted = match counted {
            prune::Counted::Windows => Counted::Windows,
            prune::Counted::Passes => Counted::Passes,
        };
        let progress = self.watch.begin(Task { verb: "rank", size: total, counted });
        progress.start(total);
        self.progress = Some(progress);
    }

    fn step(&mut self) {
        if let Some(progress) = &self.progress {
            progress.advance(1);
        }
    }

    fn save(&mut self, ranking: &Ranking) -> llmpress_formats::Result<()> {
        (self.save)(ranking)
    }
}

/// What a chain would come to as far as headers tell: every pass, and a view of about the size that they leave.
pub(crate) fn forecast(dir: &Path, request: &Request) -> Result<Forecasts> {
    request.check()?;
    let mut checkpoint = request.recipe.open(dir)?;
    let mut recipe = Recipe { passes: Vec::new(), ..request.recipe.clone() };
    let compiled = request.recipe.compile()?;
    let mut finished: BTreeMap<String, Foreseen> = BTreeMap::new();
    // What is 2:4 by then, and whether sums are beside it.
    let mut sparse: BTreeMap<String, bool> = BTreeMap::new();
    // What the pass that makes them so still has to choose.
    let mut choices: Option<Choices> = None;
    let mut passes: Vec<(Pass, Option<PassForecast>)> = Vec::new();
    let mut rankings = request.rankings.iter();
    let (mut files, mut ranked) = (BTreeMap::new(), 0);
    let mut needs_whole_model: Option<String> = None;
    for (index, pass) in request.recipe.passes.iter().enumerate() {
        let by_whole_model = match pass {
            Pass::Prune(_) | Pass::Remove(_) => false,
            Pass::Quantise(quantiser) => !is_by_matrix(quantiser, &checkpoint, &compiled)?,
            _ => true,
        };
        if by_whole_model {
            needs_whole_model.get_or_insert_with(|| pass.to_string());
        }
        let settled = match pass {
            Pass::Remove(_) | Pass::Sparsified(_) | Pass::Trained(_) | Pass::Quantised(_) => pass.clone(),
            Pass::Train(settings) => {
                let found = train::forecast(&checkpoint, &sparse, settings)?;
                for (name, sums) in &mut sparse {
                    *sums |= settings.slorb;
                    let tensor = checkpoint.tensor(name)?;
                    let bytes = train::expected_bytes(tensor, *sums, recipe.to);
                    finished.insert(name.clone(), Foreseen::sparse(bytes, *sums));
                }
                let settled = Pass::Trained(Trained { to: *settings, text: None });
                checkpoint = apply(checkpoint, &settled)?;
                recipe.passes.push(pass.clone());
                passes.push((settled, Some(PassForecast::Finish(found))));
                continue;
            }
            Pass::Sparsify(sparsifier) => {
                let tensors = sparsify::targets(&checkpoint, &compiled)?;
                let cut = request.calibration.cut(Quantiser::WINDOWS);
                choices = Choices::of(sparsifier, &tensors, &compiled, &request.recipe.passes[index + 1..]);
                choices.as_ref().map_or(Ok(()), |choices| choices.check(&checkpoint))?;
                let found = sparsify::forecast(&checkpoint, &tensors, sparsifier, choices.as_ref(), cut)?;
                for name in &tensors {
                    let tensor = checkpoint.tensor(name)?;
                    let all = sparsify::stored_bytes(tensor, sparsifier, recipe.to);
                    let some = choices.as_ref().and_then(|choices| {
                        choices.expected_bytes(name, tensor, all, dense_bytes(tensor, recipe.to))
                    });
                    finished.insert(name.clone(), Foreseen::sparse(some.unwrap_or(all), sparsifier.slorb));
                    sparse.insert(name.clone(), sparsifier.slorb);
                }
                let settled = Pass::Sparsified(Sparsified::new(*sparsifier, None));
                checkpoint = apply(checkpoint, &settled)?;
                recipe.passes.push(pass.clone());
                passes.push((settled, Some(PassForecast::Finish(found))));
                continue;
            }
            Pass::Quantise(quantiser) => {
                let specs = targets(&checkpoint, quantiser.spec, &compiled)?;
                let cut = request.calibration.cut(Quantiser::WINDOWS);
                let assigned = Assigned::of(quantiser, &specs, &compiled);
                let mut found =
                    forecast_of_quantiser(&checkpoint, &specs, &quantiser.with, assigned.as_ref(), cut)?;
                for name in sparse_of_view(&checkpoint, &specs)? {
                    let encoding = checkpoint.unit_of(checkpoint.tensor(&name)?)?.encoding();
                    sparse.entry(name).or_insert(matches!(encoding, Encoding::Lowrank(_)));
                }
                let names: BTreeSet<String> =
                    specs.keys().filter(|name| sparse.contains_key(*name)).cloned().collect();
                check_sparse(quantiser, &specs, &names)?;
                for (name, spec) in &specs {
                    let tensor = checkpoint.tensor(name)?;
                    let dense = expected_bytes(name, spec, tensor, assigned.as_ref());
                    let of_sparse = sparse.get(name).copied();
                    let bytes = match of_sparse {
                        Some(sums) => {
                            let all = expected_sparse_bytes(spec, tensor, sums);
                            let some = |choices: &Choices| choices.expected_bytes(name, tensor, all, dense);
                            choices.as_ref().and_then(some).unwrap_or(all)
                        }
                        None => dense,
                    };
                    found.bytes = found.bytes.saturating_sub(dense).saturating_add(bytes);
                    finished.insert(name.clone(), Foreseen::quantised(bytes, spec.abq, of_sparse));
                }
                found.bits_per_weight = found.bytes as f64 * 8.0 / found.weights.max(1) as f64;
                let settled = Pass::Quantised(Quantised { to: *quantiser, calibration: None });
                checkpoint = apply(checkpoint, &settled)?;
                recipe.passes.push(pass.clone());
                passes.push((settled, Some(PassForecast::Finish(found))));
                continue;
            }
            Pass::Prune(pruning) => {
                let given = if pruning.calibrated() { rankings.next() } else { None };
                let before = stand_in(&recipe, &passes);
                let open = || Ok(Model::open(Arc::new(view(request.recipe.open(dir)?, &before.passes)?))?);
                // What a baseline takes depends on what was chosen before it.
                let open_before = recipe.passes.iter().any(|pass| !pass.is_settled());
                let name = file_name(ranked);
                ranked += 1;
                match if open_before { None } else { known(given, pruning, &open)? } {
                    Some(ranking) => {
                        let text = String::from_utf8(ranking.to_json()?)
                            .map_err(|e| Error::Invalid(format!("{name}: {e}")))?;
                        files.insert(name, text);
                        Pass::Remove(ranking.removal(pruning.count(&ranking)?, pruning.portable)?)
                    }
                    None => {
                        needs_whole_model.get_or_insert_with(|| pass.to_string());
                        // Later passes that name layers must find them.
                        let named = named_layers(&request.recipe.passes[index + 1..]);
                        let (forecast, removal) = pruning.forecast(
                            &checkpoint,
                            request.calibration.cut(pruning.default_windows()),
                            &named,
                        )?;
                        rename(&mut finished, &removal, &checkpoint)?;
                        let settled = Pass::Remove(removal);
                        checkpoint = apply(checkpoint, &settled)?;
                        recipe.passes.push(pass.clone());
                        passes.push((settled, Some(PassForecast::Prune(forecast))));
                        continue;
                    }
                }
            }
        };
        if let Pass::Remove(removal) = &settled {
            rename(&mut finished, removal, &checkpoint)?;
        }
        checkpoint = apply(checkpoint, &settled)?;
        recipe.passes.push(settled.clone());
        passes.push((settled, None));
    }
    let stand_in = stand_in(&recipe, &passes);
    let forecasts = recipe.passes.iter().zip(passes).map(|(pass, (_, forecast))| (pass.clone(), forecast));
    let passes = forecasts.collect();
    let view = request.on_base(checkpoint)?;
    Ok(Forecasts { passes, recipe, stand_in, view, finished, needs_whole_model, files })
}

/// Whether a quantiser that is given no text goes by one matrix at a time, so that each can be quantised wherever it is stored.
fn is_by_matrix(quantiser: &Quantiser, view: &Checkpoint, rules: &Compiled) -> Result<bool> {
    let alone = |spec: &Spec| spec.learn.is_none() && !Quantiser::of(*spec).needs_text();
    let of_model = quantiser.with.is_empty() && quantiser.mean.is_none();
    Ok(of_model && targets(view, quantiser.spec, rules)?.values().all(alone))
}

/// Bytes of a tensor that no pass finishes, by the method of all others.
fn dense_bytes(tensor: &Tensor, to: Method) -> u64 {
    // As it is where the method does not hold it by itself.
    match to.room().fit(tensor) {
        Fit::Suits => to.room().expected_bytes(Some(tensor), tensor.bytes),
        Fit::Planes | Fit::Raw => tensor.bytes,
    }
}

/// What is known of tensors goes with their names.
fn rename(known: &mut BTreeMap<String, Foreseen>, removal: &Removal, checkpoint: &Checkpoint) -> Result<()> {
    let edit = removal.edit(checkpoint)?;
    let left = std::mem::take(known)
        .into_iter()
        .filter(|(name, _)| !edit.drop.contains_key(name) && !edit.zero.contains(name));
    *known = left.map(|(name, seen)| (edit.rename.get(&name).cloned().unwrap_or(name), seen)).collect();
    Ok(())
}

/// A ranking that takes no data: one that was saved, or a baseline.
fn known(
    given: Option<&PathBuf>,
    pass: &prune::Pass,
    open: &dyn Fn() -> Result<Model>,
) -> Result<Option<Ranking>> {
    match given {
        Some(path) => Ok(Some(saved(path, pass, &open()?)?)),
        None if pass.calibrated() => Ok(None),
        None => Ok(Some(rank(&open()?, pass, None, None, &Unwatched, &mut |_| Ok(()))?)),
    }
}

/// Nobody watches.
struct Unwatched;

impl Watch for Unwatched {
    fn begin(&self, _task: Task) -> Box<dyn Progress + '_> {
        Box::new(Self)
    }
}

impl Progress for Unwatched {
    fn start(&self, _total: u64) {}
    fn advance(&self, _amount: u64) {}
    fn shard(&self, _file: &str) {}
}

/// The sub-layers that passes name.
fn named_layers(passes: &[Pass]) -> Removal {
    let mut named = Removal::default();
    for pass in passes {
        if let Pass::Remove(removal) = pass {
            named.attention.extend(&removal.attention);
            named.mlp.extend(&removal.mlp);
        }
    }
    named
}

/// The recipe with what stands for passes that are not settled.
fn stand_in(recipe: &Recipe, passes: &[(Pass, Option<PassForecast>)]) -> Recipe {
    Recipe { passes: passes.iter().map(|(pass, _)| pass.clone()).collect(), ..recipe.clone() }
}

/// What headers tell of a chain.
pub(crate) struct Forecasts {
    /// The recipe, settled as far as it can be.
    pub(crate) recipe: Recipe,
    /// The same with removals that stand for what is still to be chosen.
    pub(crate) stand_in: Recipe,
    /// The source as the stand-in leaves it.
    pub(crate) view: Checkpoint,
    /// Every pass, and what it takes if it is still to be worked out.
    pub(crate) passes: Vec<(Pass, Option<PassForecast>)>,
    /// The tensors of the view that a pass is to finish.
    pub(crate) finished: BTreeMap<String, Foreseen>,
    /// The first pass that goes by more than a matrix alone and is still to run.
    pub(crate) needs_whole_model: Option<String>,
    /// The rankings that are settled, as files of the output.
    pub(crate) files: BTreeMap<String, String>,
}
