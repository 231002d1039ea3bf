//! Making shards of a plan beside others who make shards of it.
//!
//! ```text
//! receipt of this plan, shard hashed --yes--> done already
//!        '--no--> OUT/.llmpress/work/unit-00003-XXXXXX/: passes, encode, decode and compare, sync
//!                 --rename--> OUT/SHARD --rename--> OUT/.llmpress/SHARD.json
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use llmpress_formats::{Error as FormatError, Manifest, ShardEntry};
use tempfile::TempDir;

use crate::convert::{join, pool};
use crate::duplicates::Duplicates;
use crate::joint::{Joined, Joint, Private, put};
use crate::partial::partial_view;
use crate::plan::PlannedShard;
use crate::receipt::{Receipt, path as receipt_path};
use crate::resumed::receipt_of;
use crate::shard::{EncodedShard, encode_shard};
use crate::work::{Threads, Work};
use crate::{Budget, Error, Options, Progress, Result, Spread};

/// Folders of a process that hold what it has in work: to be removed where it ends before it can do so.
#[derive(Debug, Clone, Default)]
pub struct Scratch(Arc<Mutex<BTreeSet<PathBuf>>>);

impl Scratch {
    /// Makes a folder, so that whoever removes all of them finds it or keeps it from being made.
    pub(crate) fn create(&self, make: impl FnOnce() -> std::io::Result<TempDir>) -> std::io::Result<TempDir> {
        let mut folders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = make()?;
        folders.insert(folder.path().to_owned());
        Ok(folder)
    }

    pub(crate) fn forget(&self, path: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
    }

    /// Removes them all: what was in work is lost, and nothing else. From then on whoever wants another one waits for the end of the
    /// process, which is to follow.
    pub fn remove_and_close(&self) {
        let folders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for folder in &*folders {
            // Somebody may be putting a file into it.
            for _ in 0..ATTEMPTS {
                if std::fs::remove_dir_all(folder).is_ok() || !folder.exists() {
                    break;
                }
            }
        }
        std::mem::forget(folders);
    }
}

/// How often a folder is removed in which files appear.
const ATTEMPTS: usize = 100;

/// What a worker came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Worked {
    /// Units that it made, by number.
    pub made: Vec<usize>,
    /// Units that were there already, or that others made meanwhile.
    pub found: Vec<usize>,
    /// Bytes of the tensors of those that it made.
    pub source_bytes: u64,
    /// Bytes of the shards that it made.
    pub output_bytes: u64,
    /// Tensors that are stored otherwise than asked for, and why.
    pub fallbacks: Vec<(String, String)>,
    /// Threads and memory it ran with.
    pub budget: Budget,
    /// Seconds that it took.
    pub seconds: f64,
}

impl Spread {
    /// Makes shards by their numbers, as far as they are not there. Others may make others, or the same, at the same time, on this
    /// machine or another: what comes of it is the same bytes.
    ///
    /// # Errors
    /// A number that there is not; an output that another plan has begun, or one process has for itself.
    pub fn work(
        &self,
        out: &Path,
        numbers: &[usize],
        options: &Options,
        scratch: &Scratch,
        progress: &dyn Progress,
    ) -> Result<Worked> {
        let start = Instant::now();
        let mut shards = Vec::new();
        for &number in numbers.iter().collect::<BTreeSet<_>>() {
            shards.push(self.plan.shards.get(number).ok_or_else(|| {
                Error::Invalid(format!(
                    "there is no unit {number}: the plan has {} units, from 0",
                    self.plan.shards.len()
                ))
            })?);
        }
        let budget = self.plan.budget(&self.view, options.jobs, options.max_memory)?;
        let mut worked = Worked {
            made: Vec::new(),
            found: Vec::new(),
            source_bytes: 0,
            output_bytes: 0,
            fallbacks: Vec::new(),
            budget,
            seconds: 0.0,
        };
        let pool = pool(budget.jobs)?;
        match Joint::join(out, self.job(), scratch)? {
            Joined::Complete => worked.found = shards.iter().map(|shard| shard.number).collect(),
            Joined::Work(joint) => {
                let duplicates = pool.install(|| Duplicates::find(&self.view, &self.plan))?;
                let step = Step { spread: self, out, joint: &joint, scratch, budget, duplicates, progress };
                pool.install(|| step.make_all(&shards, &mut worked))?;
            }
        }
        worked.made.sort_unstable();
        worked.found.sort_unstable();
        worked.seconds = start.elapsed().as_secs_f64();
        Ok(worked)
    }
}

/// What every unit of a worker has in common.
struct Step<'a> {
    spread: &'a Spread,
    out: &'a Path,
    joint: &'a Joint,
    scratch: &'a Scratch,
    budget: Budget,
    duplicates: Duplicates,
    progress: &'a dyn Progress,
}

/// A unit in work that is encoded, with its folder.
type Encoded = (EncodedShard, Private);

impl Step<'_> {
    /// Makes what is not there. While one is synced to disk the next is encoded.
    fn make_all(&self, shards: &[&PlannedShard], worked: &mut Worked) -> Result<()> {
        let reads = |shard: &PlannedShard| {
            shard.units.iter().map(|u| u.source_bytes * u.method.room().reads()).fold(0, u64::saturating_add)
        };
        self.progress.start(shards.iter().map(|shard| reads(shard)).sum());
        let (mut todo, mut needed) = (Vec::new(), 0u64);
        for &shard in shards {
            if receipt_of(self.out, &self.spread.plan, shard).is_some() {
                self.joint.remove_leftovers(&prefix(shard));
                self.progress.resumed(reads(shard));
                worked.found.push(shard.number);
            } else {
                needed = needed.saturating_add(shard.expected_bytes);
                todo.push(shard);
            }
        }
        crate::space::check(self.out, needed)?;
        std::thread::scope(|scope| {
            let mut publishing = None;
            let mut note = |(shard, made): (&PlannedShard, Option<Receipt>)| match made {
                None => worked.found.push(shard.number),
                Some(receipt) => {
                    worked.made.push(shard.number);
                    worked.source_bytes += shard.source_bytes;
                    worked.output_bytes += receipt.shard.bytes;
                    let why =
                        receipt.units.into_iter().filter_map(|(name, unit)| Some((name, unit.fallback?)));
                    worked.fallbacks.extend(why);
                }
            };
            for shard in todo {
                let encoded = self.encode(shard);
                if let Some(before) = publishing.take() {
                    note(join(before)?);
                }
                publishing = Some(scope.spawn(move || -> Result<(&PlannedShard, Option<Receipt>)> {
                    match encoded.and_then(|encoded| self.publish(shard, encoded)) {
                        Ok(receipt) => Ok((shard, Some(receipt))),
                        // Who made the same unit at the same time was faster, and has cleared the way for the next.
                        Err(_) if self.is_done(shard) => Ok((shard, None)),
                        Err(e) => Err(e),
                    }
                }));
            }
            if let Some(last) = publishing.take() {
                note(join(last)?);
            }
            Ok(())
        })
    }

    fn encode(&self, shard: &PlannedShard) -> Result<Encoded> {
        let private = self.joint.private(&prefix(shard), self.scratch)?;
        let work = Work {
            piece_bytes: self.budget.piece_bytes,
            batch: self.budget.jobs * 2,
            threads: Threads::Pool,
            progress: self.progress,
        };
        let own = private.path().join(&shard.file);
        if !self.spread.quantises() {
            return Ok((encode_shard(&self.spread.view, shard, &own, &self.duplicates, work)?, private));
        }
        let stage = private.path().join("passes");
        std::fs::create_dir(&stage).map_err(|e| FormatError::io(&stage, "create", e))?;
        let names = shard.units.iter().flat_map(|unit| &unit.tensors).cloned().collect();
        let view = partial_view(&self.spread.dir, &self.spread.plan.recipe, names, &stage)?;
        Ok((encode_shard(&view, shard, &own, &self.duplicates, work)?, private))
    }

    /// Puts a shard in its place, and then its receipt.
    fn publish(&self, shard: &PlannedShard, (encoded, private): Encoded) -> Result<Receipt> {
        let written = encoded.writer.finish()?;
        let receipt = Receipt {
            fingerprint: self.spread.plan.fingerprint.clone(),
            shard: ShardEntry { bytes: written.bytes, header_blake3: written.header_blake3 },
            stored_bytes: written.tensor_bytes,
            units: encoded.units,
            tensors: encoded.tensors,
        };
        let own = private.path().join("receipt.json");
        receipt.write_to(&own)?;
        // A source that changed meanwhile would make a mixture.
        self.spread.view.check_unchanged()?;
        put(&private.path().join(&shard.file), &self.out.join(&shard.file))?;
        put(&own, &receipt_path(self.out, &shard.file))?;
        self.joint.remove_leftovers(&prefix(shard));
        self.progress.shard(&shard.file);
        Ok(receipt)
    }

    /// Whether somebody else has made a unit, or everything.
    fn is_done(&self, shard: &PlannedShard) -> bool {
        let complete = || {
            let manifest = Manifest::read(self.out).ok()??;
            crate::complete::other_origin(&manifest, self.spread.job()).ok()
        };
        receipt_of(self.out, &self.spread.plan, shard).is_some() || matches!(complete(), Some(None))
    }
}

/// What the names of folders begin with in which a unit is made.
fn prefix(shard: &PlannedShard) -> String {
    format!("unit-{:05}-", shard.number)
}
