//! Carrying out a plan.
//!
//! ```text
//! recipe with passes --> view, plan
//! for each shard without a receipt: encode, compare --> (meanwhile) sync, name, receipt
//! then: merge
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use llmpress_formats::{Checkpoint, Kind, MANIFEST_FILE, Producer, ShardEntry, UnitEntry};

use crate::carried::carried;
use crate::chain::{Earlier, settle};
use crate::duplicates::Duplicates;
use crate::job::Job;
use crate::merge::merge;
use crate::output::{Output, Permissions, Prepared};
use crate::progress::{Counted, Task, Watch};
use crate::receipt::Receipt;
use crate::shard::{EncodedShard, encode_shard};
use crate::space::check_passes;
use crate::stage::Stage;
use crate::work::{Threads, Work};
use crate::{Budget, Error, Pass, Plan, Progress, Request, Result, Uncovered};

/// How a conversion is to run. None of it changes the output.
#[derive(Debug, Clone)]
pub struct Options {
    /// Worker threads; `None` for one per processor.
    pub jobs: Option<usize>,
    /// Most memory to use, in bytes.
    pub max_memory: Option<u64>,
    /// Go on with an unfinished conversion.
    pub resume: bool,
    /// Replace what an earlier conversion left at the output.
    pub force: bool,
    /// What the manifest says of the program.
    pub producer: Producer,
    /// Files to put beside the source's, by name; they replace those.
    pub extra_files: BTreeMap<String, Vec<u8>>,
}

/// What a conversion came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Bytes of the source's tensors, decoded.
    pub source_bytes: u64,
    /// Bytes of the output's shards.
    pub output_bytes: u64,
    /// Shards.
    pub shards: usize,
    /// Shards that an earlier run had finished.
    pub resumed: usize,
    /// Units that are stored otherwise than asked for, and why.
    pub fallbacks: Vec<(String, String)>,
    /// What was left as it was though it was asked for otherwise, where that is much.
    pub uncovered: Option<Uncovered>,
    /// Source files that were neither read nor copied.
    pub left_behind: Vec<String>,
    /// Files of an earlier job at the output that were removed.
    pub removed: Vec<String>,
    /// Threads and memory it ran with.
    pub budget: Budget,
    /// Seconds that it took, without the passes.
    pub seconds: f64,
}

/// Makes what is asked for: works out the passes, plans, and carries out the plan.
pub fn convert_request(
    dir: &Path,
    out: &Path,
    request: &Request,
    max_shard_bytes: u64,
    options: &Options,
    watch: &dyn Watch,
) -> Result<Summary> {
    let mut options = options.clone();
    let allow = Permissions { resume: options.resume, force: options.force };
    let open = request.recipe.passes.iter().any(|pass| !pass.is_settled());
    let finishes = request.recipe.passes.iter().any(Pass::finishes_units);
    // A stage is put beside what it is to replace, before anything else is looked at.
    let holds_source = || Some(dir.canonicalize().ok()?.starts_with(out.canonicalize().ok()?));
    if finishes && holds_source() == Some(true) {
        return Err(Error::Output {
            path: out.to_owned(),
            what: "is or contains the source: choose another output directory".to_owned(),
        });
    }
    let stage = if open { Stage::open(out, allow, finishes)? } else { None };
    let finished = (options.resume && out.join(MANIFEST_FILE).exists()).then_some(out);
    if finishes && finished.is_none() {
        check_passes(dir, out, request, max_shard_bytes)?;
    }
    let earlier =
        Earlier { stage: stage.as_ref(), finished, force: options.force, memory: options.max_memory };
    let settled = pool(options.jobs.unwrap_or(0))?.install(|| settle(dir, request, &earlier, watch))?;
    options.extra_files.extend(settled.files);
    // What the passes left in a new directory is an unfinished job's: this one's.
    options.resume |= stage.is_some_and(|stage| stage.is_taken());
    let plan = Plan::new(&settled.view, &settled.recipe, max_shard_bytes)?;
    let task = Task { verb: "convert", size: plan.source_bytes, counted: Counted::Bytes };
    let progress = watch.begin(task);
    convert(&settled.view, out, &plan, &options, &*progress)
}

/// So many threads; one per processor for 0.
pub(crate) fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|e| Error::Limit(format!("cannot start {threads} threads: {e}")))
}

/// Converts a checkpoint by a plan.
pub fn convert(
    checkpoint: &Checkpoint,
    out: &Path,
    plan: &Plan,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Summary> {
    let budget = plan.budget(checkpoint, options.jobs, options.max_memory)?;
    let start = Instant::now();
    let pool = pool(budget.jobs)?;
    let carried = carried(checkpoint)?;
    carried.check(checkpoint)?;
    let mut summary = Summary {
        source_bytes: plan.source_bytes,
        output_bytes: 0,
        shards: plan.shards.len(),
        resumed: 0,
        fallbacks: Vec::new(),
        uncovered: Uncovered::of(checkpoint, plan),
        left_behind: carried.left_behind.clone(),
        removed: Vec::new(),
        budget,
        seconds: 0.0,
    };
    let allow = Permissions { resume: options.resume, force: options.force };
    let job = Job { checkpoint, plan, carried: &carried, extra_files: &options.extra_files };
    let mut output = match pool.install(|| Output::prepare(out, job, allow, progress))? {
        Prepared::Work(output) => output,
        Prepared::Complete(manifest) => {
            summary.resumed = summary.shards;
            summary.output_bytes = manifest.shards.values().map(|s| s.bytes).fold(0, u64::saturating_add);
            let fallback = |(name, unit): (String, UnitEntry)| Some((name, unit.fallback?));
            summary.fallbacks = manifest.units.into_iter().filter_map(fallback).collect();
            summary.seconds = start.elapsed().as_secs_f64();
            return Ok(summary);
        }
    };
    summary.removed = std::mem::take(&mut output.removed);
    let receipts = pool.install(|| shards(checkpoint, &output, plan, budget, progress, &mut summary))?;
    for (_, receipt) in &receipts {
        summary.output_bytes += receipt.shard.bytes;
        for (name, unit) in &receipt.units {
            if let Some(reason) = &unit.fallback {
                summary.fallbacks.push((name.clone(), reason.clone()));
            }
        }
    }
    let source = crate::source::describe(checkpoint, &carried)?;
    merge(job, &output, receipts, source, options)?;
    output.complete()?;
    summary.seconds = start.elapsed().as_secs_f64();
    Ok(summary)
}

/// Turns a compressed checkpoint back into a plain one: byte for byte where nothing was lost; what was quantised has the
/// values that it decodes to, in the dtype of the original.
pub fn restore(
    checkpoint: &Checkpoint,
    out: &Path,
    max_shard_bytes: u64,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Summary> {
    if checkpoint.kind() == Kind::HuggingFace && !checkpoint.is_dequantised() {
        return Err(Error::Invalid(format!(
            "{}: is a plain checkpoint already: there is nothing to restore",
            checkpoint.root().display()
        )));
    }
    let mut plan = Plan::plain(checkpoint, max_shard_bytes)?;
    name_only_shard(&mut plan);
    convert(checkpoint, out, &plan, options, progress)
}

/// Gives the shard of a plain checkpoint, where it is the only one, the name that everybody looks for.
pub(crate) fn name_only_shard(plan: &mut Plan) {
    if let [only] = plan.shards.as_mut_slice() {
        only.file = "model.safetensors".to_owned();
    }
}

/// Receipts by shard, in order.
type Receipts = Vec<(String, Receipt)>;

/// Makes the shards that have no receipt yet. While one is synced to disk the next is encoded.
fn shards(
    checkpoint: &Checkpoint,
    output: &Output,
    plan: &Plan,
    budget: Budget,
    progress: &dyn Progress,
    summary: &mut Summary,
) -> Result<Receipts> {
    let mut done = crate::resumed::finished(&output.root, plan);
    summary.resumed = done.len();
    let missing: Vec<_> = plan.shards.iter().filter(|s| !done.contains_key(s.file.as_str())).collect();
    let todo = || missing.iter().flat_map(|s| &s.units);
    output.check_space(todo().map(|u| u.expected_bytes).sum())?;
    progress.start(todo().map(|u| u.source_bytes * u.method.room().reads()).sum());
    let work =
        Work { piece_bytes: budget.piece_bytes, batch: budget.jobs * 2, threads: Threads::Pool, progress };
    let duplicates = match missing.is_empty() {
        true => Duplicates::default(),
        false => Duplicates::find(checkpoint, plan)?,
    };
    std::thread::scope(|scope| {
        let mut publishing: Option<std::thread::ScopedJoinHandle<'_, Result<(&str, Receipt)>>> = None;
        for shard in missing {
            let encoded = encode_shard(checkpoint, shard, &output.root.join(&shard.file), &duplicates, work)?;
            if let Some((file, receipt)) = publishing.take().map(join).transpose()? {
                done.insert(file, receipt);
            }
            let file = shard.file.as_str();
            publishing = Some(scope.spawn(move || {
                let receipt = publish(output, plan, file, encoded)?;
                progress.shard(file);
                Ok((file, receipt))
            }));
        }
        if let Some((file, receipt)) = publishing.take().map(join).transpose()? {
            done.insert(file, receipt);
        }
        Ok(done.into_iter().map(|(file, receipt)| (file.to_owned(), receipt)).collect())
    })
}

/// What a thread came to.
pub(crate) fn join<T>(handle: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    handle.join().unwrap_or_else(|_| Err(Error::Invalid("a writer thread failed".into())))
}

fn publish(output: &Output, plan: &Plan, file: &str, encoded: EncodedShard) -> Result<Receipt> {
    let written = encoded.writer.finish()?;
    let receipt = Receipt {
        fingerprint: plan.fingerprint.clone(),
        shard: ShardEntry { bytes: written.bytes, header_blake3: written.header_blake3 },
        stored_bytes: written.tensor_bytes,
        units: encoded.units,
        tensors: encoded.tensors,
    };
    receipt.write(&output.root, file)?;
    Ok(receipt)
}
