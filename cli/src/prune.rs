//! What pruning adds to a conversion: the ranking, and the checkpoint without what goes.

use std::path::Path;
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Error, Removal};
use llmpress_model::{Model, Tokenizer};
use llmpress_pipeline::{Progress, Recipe};
use llmpress_prune::{
    Calibration, FinerCut, Method, PRUNING_FILE, Pass, Ranking, Search, Target, drop_ranking, finercut,
    last_ranking, random_ranking,
};

use crate::args::{CalibrationArgs, RecipeArgs};
use crate::models::read_text;
use crate::progress::{Bar, Unit};
use crate::report::{Failure, Output};

/// Calibration windows of LLM-Drop, and of FinerCut.
const WINDOWS: (usize, usize) = (64, 10);

/// What a conversion is to make, and of what.
pub(crate) struct Asked {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) recipe: Recipe,
    /// Files to put beside the source's.
    pub(crate) files: Option<(String, Vec<u8>)>,
}

/// A checkpoint without some sub-layers.
pub(crate) fn pruned(checkpoint: Checkpoint, removal: Option<&Removal>) -> Result<Checkpoint, Failure> {
    match removal {
        None => Ok(checkpoint),
        Some(removal) => {
            let edit = removal.edit(&checkpoint)?;
            Ok(checkpoint.edited(&edit)?)
        }
    }
}

/// Reads what is asked for; where that is a pruning, ranks the sub-layers.
pub(crate) fn ask(
    dir: &Path,
    args: &RecipeArgs,
    jobs: Option<u16>,
    output: Output,
) -> Result<Asked, Failure> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut recipe = crate::plan::recipe(args)?;
    let pass = args.to.as_ref().and_then(|to| to.prune);
    let mut files = None;
    match pass {
        Some(pass) => {
            let ranking = match &args.ranking {
                Some(path) => {
                    let ranking = Ranking::read(path)?;
                    ranking.check(&model(dir)?)?;
                    if ranking.method != pass.ranking_name() {
                        return Err(Failure::from(Error::Invalid(format!(
                            "{} ranks by {}, not by {}",
                            path.display(),
                            ranking.method,
                            pass.ranking_name()
                        ))));
                    }
                    ranking
                }
                None => rank(dir, pass, &args.calibration, jobs, None, output)?,
            };
            recipe.prune = Some(ranking.removal(count(&ranking, pass)?, args.portable)?);
            files = Some((PRUNING_FILE.to_owned(), ranking.to_json()?));
        }
        None if args.calibration.calib.is_some() || args.ranking.is_some() => {
            return Err(Failure::Usage(
                "--calib and --ranking are for prunings: --to drop:... or finercut:...".to_owned(),
            ));
        }
        None => {
            if let Some(prune) = &mut recipe.prune {
                prune.portable |= args.portable;
            } else if args.portable {
                return Err(Failure::Usage(
                    "--portable is for prunings: --to drop:... or finercut:...".to_owned(),
                ));
            }
        }
    }
    let checkpoint = pruned(checkpoint, recipe.prune.as_ref())?;
    Ok(Asked { checkpoint, recipe, files })
}

fn model(dir: &Path) -> Result<Model, Failure> {
    Ok(Model::open(Arc::new(Checkpoint::open(dir)?))?)
}

/// How many entries of a ranking a pass takes.
pub(crate) fn count(ranking: &Ranking, pass: Pass) -> Result<usize, Failure> {
    let total = match pass.method {
        Method::Drop { target: Target::Joint, .. }
        | Method::FinerCut { .. }
        | Method::Random { .. }
        | Method::Last => {
            return Ok(pass.amount.of(ranking.sub_layers, "sub-layers")?);
        }
        Method::Drop { iterative: false, .. } => ranking.removed.len(),
        Method::Drop { .. } => ranking.layers,
    };
    let what = match pass.method {
        Method::Drop { target: Target::Attention, .. } => "attentions",
        Method::Drop { target: Target::Mlp, .. } => "MLPs",
        _ => "layers",
    };
    Ok(pass.amount.of(total, what)?)
}

/// Where a search is saved, and whether it goes on from there.
pub(crate) struct Saved<'a> {
    pub(crate) path: &'a Path,
    pub(crate) resume: bool,
}

/// Ranks the sub-layers of a checkpoint on the threads of a pool of its own.
pub(crate) fn rank(
    dir: &Path,
    pass: Pass,
    args: &CalibrationArgs,
    jobs: Option<u16>,
    saved: Option<Saved<'_>>,
    output: Output,
) -> Result<Ranking, Failure> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(jobs.map_or(0, usize::from))
        .build()
        .map_err(|e| Failure::Usage(format!("--jobs: {e}")))?;
    pool.install(|| rank_here(dir, pass, args, saved, output))
}

fn rank_here(
    dir: &Path,
    pass: Pass,
    args: &CalibrationArgs,
    saved: Option<Saved<'_>>,
    output: Output,
) -> Result<Ranking, Failure> {
    let model = model(dir)?;
    let calibration = |windows: usize| -> Result<Calibration, Failure> {
        let path = args.calib.as_ref().ok_or_else(|| {
            Failure::Usage(format!(
                "{} judges sub-layers by a text: give one with --calib",
                pass.ranking_name()
            ))
        })?;
        let tokenizer = Tokenizer::open(dir)?;
        let ids = tokenizer.encode(&read_text(path)?)?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= model.vocab_size()) {
            return Err(Failure::from(Error::Invalid(format!(
                "the tokenizer gives token id {id}, beyond the vocabulary of {}",
                model.vocab_size()
            ))));
        }
        let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        Ok(Calibration::new(&ids, args.calib_windows.unwrap_or(windows), args.calib_window, bos)?)
    };
    match pass.method {
        Method::Random { seed } => Ok(random_ranking(&model, seed)),
        Method::Last => Ok(last_ranking(&model)),
        Method::Drop { target, iterative } => {
            let calibration = calibration(WINDOWS.0)?;
            let all = match target {
                Target::Joint => model.sub_layers().len(),
                _ => model.config().layers.len(),
            };
            // The amount is checked before the work.
            let rounds = if iterative { pass.amount.of(all, "sub-layers or layers")? } else { 1 };
            let total = rounds * calibration.windows().len();
            let bar = Bar::of("rank", total as u64, Unit::Windows, output);
            bar.start(total as u64);
            let ranking =
                drop_ranking(&model, target, iterative.then_some(rounds), &calibration, &mut || {
                    bar.advance(1)
                });
            bar.finish();
            Ok(ranking?)
        }
        Method::FinerCut { distance, protect } => {
            let calibration = calibration(WINDOWS.1)?;
            let count = pass.amount.of(model.sub_layers().len(), "sub-layers")?;
            let options = FinerCut { distance, protect, count, search: Search::CachedPrefixes };
            let found = match &saved {
                Some(saved) if saved.resume && saved.path.exists() => Some(Ranking::read(saved.path)?),
                _ => None,
            };
            let done = found.as_ref().map_or(0, |ranking| ranking.removed.len()).min(count);
            let passes: usize = options.candidates(&model).iter().skip(done).sum();
            let total = (passes * calibration.windows().len()) as u64;
            let bar = Bar::of("rank", total, Unit::Passes, output);
            bar.start(total);
            let ranking =
                finercut(&model, &options, &calibration, found, &mut || bar.advance(1), &mut |ranking| {
                    saved.as_ref().map_or(Ok(()), |saved| ranking.write(saved.path))
                });
            bar.finish();
            Ok(ranking?)
        }
    }
}
