//! A plan that is carried out by many: what a plan and a number are enough for.
//!
//! ```text
//! plan.json --source looked at again--> Spread --share of a job--> shards, each with a receipt     on any machine, in any order
//!                                           '--merge, once--> index, configuration, manifest
//! ```

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use llmpress_formats::{Checkpoint, MANIFEST_FILE, UnitEntry};

use crate::carried::{Carried, carried};
use crate::convert::pool;
use crate::job::Job;
use crate::joint::is_begun;
use crate::merge::merge;
use crate::output::{Output, Permissions, Prepared};
use crate::{Error, Options, Pass, Plan, Progress, Request, Result, Summary, Uncovered};

/// A plan whose shards are made one by one, wherever its source and its output can be reached.
pub struct Spread {
    /// Every pass of its recipe is settled.
    pub(crate) plan: Plan,
    pub(crate) dir: PathBuf,
    /// The source as the passes leave it; what they will quantise is seen as it was before.
    pub(crate) view: Checkpoint,
    pub(crate) carried: Carried,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

impl Spread {
    /// Takes a saved plan and the source that it is of, which is planned again: what comes out otherwise is refused.
    ///
    /// # Errors
    /// A pass that goes by the whole model; a source that is another one by now.
    pub fn open(saved: &Plan, dir: &Path) -> Result<Self> {
        if let Some(pass) = &saved.needs_whole_model {
            return Err(Error::Invalid(format!(
                "{pass} goes by the whole model, block after block, so its job cannot be spread: run `llmpress convert` with the same \
                 --to and its --calib on one machine; what can be spread are methods, rtn:... and grid:... without a text, and \
                 prunings by a --ranking"
            )));
        }
        let base = saved.base.as_ref().map(PathBuf::from);
        let request = Request { base, ..Request::new(saved.recipe.clone()) };
        let (plan, view, recipe) = Plan::forecast_with_stand_in(dir, &request, saved.max_shard_bytes)?;
        plan.check_same(saved)?;
        let carried = carried(&view)?;
        carried.check(&view)?;
        let files =
            saved.files.iter().map(|(name, text)| (name.clone(), text.clone().into_bytes())).collect();
        let plan = Plan { recipe, passes: Vec::new(), files: saved.files.clone(), ..plan };
        Ok(Self { plan, dir: dir.to_owned(), view, carried, files })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What its method leaves as it was, where that is much.
    pub fn uncovered(&self) -> Option<Uncovered> {
        Uncovered::of(&self.view, &self.plan)
    }

    pub(crate) fn job(&self) -> Job<'_> {
        Job { checkpoint: &self.view, plan: &self.plan, carried: &self.carried, extra_files: &self.files }
    }

    /// Whether a pass has to finish a shard's tensors before it can be made.
    pub(crate) fn quantises(&self) -> bool {
        self.plan.recipe.passes.iter().any(|pass| matches!(pass, Pass::Quantised(_)))
    }

    /// Writes what makes the output complete, after all shards: each is hashed again. What another run has merged already is compared
    /// with what this one would make.
    ///
    /// # Errors
    /// Shards that nobody has made, by their numbers; workers that are still there.
    pub fn merge(&self, out: &Path, options: &Options, progress: &dyn Progress) -> Result<Summary> {
        let start = Instant::now();
        let plan = &self.plan;
        let missing =
            |missing: Vec<usize>| Error::Missing { path: out.to_owned(), missing, of: plan.shards.len() };
        if !is_begun(out, plan)? && !out.join(MANIFEST_FILE).exists() {
            return Err(missing((0..plan.shards.len()).collect()));
        }
        let budget = plan.budget(&self.view, options.jobs, options.max_memory)?;
        let pool = pool(budget.jobs)?;
        let mut summary = Summary {
            source_bytes: plan.source_bytes,
            output_bytes: 0,
            shards: plan.shards.len(),
            resumed: plan.shards.len(),
            fallbacks: Vec::new(),
            uncovered: self.uncovered(),
            left_behind: self.carried.left_behind.clone(),
            removed: Vec::new(),
            budget,
            seconds: 0.0,
        };
        let allow = Permissions { resume: true, force: false };
        let fallback = |(name, unit): (&String, &UnitEntry)| Some((name.clone(), unit.fallback.clone()?));
        let output = match pool.install(|| Output::prepare(out, self.job(), allow, progress))? {
            Prepared::Work(output) => output,
            Prepared::Complete(manifest) => {
                summary.output_bytes = manifest.shards.values().map(|s| s.bytes).fold(0, u64::saturating_add);
                summary.fallbacks = manifest.units.iter().filter_map(fallback).collect();
                summary.seconds = start.elapsed().as_secs_f64();
                return Ok(summary);
            }
        };
        let done = pool.install(|| crate::resumed::finished(&output.root, plan));
        let open = plan.shards.iter().filter(|shard| !done.contains_key(shard.file.as_str()));
        let open: Vec<usize> = open.map(|shard| shard.number).collect();
        if !open.is_empty() {
            return Err(missing(open));
        }
        let receipts: Vec<_> = done.into_iter().map(|(file, receipt)| (file.to_owned(), receipt)).collect();
        for (_, receipt) in &receipts {
            summary.output_bytes += receipt.shard.bytes;
            summary.fallbacks.extend(receipt.units.iter().filter_map(fallback));
        }
        let source = crate::source::describe(&self.view, &self.carried)?;
        let options = Options { extra_files: self.files.clone(), ..options.clone() };
        merge(self.job(), &output, receipts, source, &options)?;
        output.complete()?;
        summary.seconds = start.elapsed().as_secs_f64();
        Ok(summary)
    }
}

impl Plan {
    /// The shards of one of so many jobs, by number: the largest first, each to the job that has least so far, the first of those. The
    /// same for everybody who asks, and empty where there are more jobs than shards.
    pub fn share(&self, jobs: usize, rank: usize) -> Vec<usize> {
        let mut loads = vec![(0u64, Vec::new()); jobs.clamp(1, self.shards.len().max(1))];
        let mut by_size: Vec<_> = self.shards.iter().collect();
        by_size.sort_by_key(|shard| (Reverse(shard.source_bytes), shard.number));
        for shard in by_size {
            let least = loads.iter_mut().min_by_key(|(bytes, shards)| (*bytes, shards.len()));
            if let Some((bytes, shards)) = least {
                *bytes = bytes.saturating_add(shard.source_bytes);
                shards.push(shard.number);
            }
        }
        let mut share = loads.into_iter().nth(rank).map(|(_, shards)| shards).unwrap_or_default();
        share.sort_unstable();
        share
    }
}
