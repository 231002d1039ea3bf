//! An output directory that several processes write to at the same time, each its own shards.
//!
//! ```text
//! OUT/.llmpress/files.json, plan.json     by whoever comes first
//!              /lock                      shared by workers, taken alone by `merge` and `convert`
//!              /work/unit-00003-XXXXXX/   one process's: what is written, before it is renamed to its place
//! ```
//!
//! Nothing here waits for another process, and nothing depends on locks: names change hands by links and renames alone, and whatever has a
//! name is whole. Two that make the same shard put the same bytes in its place, one after the other.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use llmpress_formats::{Error as FormatError, STATE_DIR, write_atomic};
use tempfile::TempDir;

use crate::job::Job;
use crate::journal::{JOURNAL_FILE, Journal};
use crate::output::{ATTEMPTS, Lock, PLAN_FILE, Permissions, Step, busy, decide, refusal, same_plan};
use crate::worker::Scratch;
use crate::{Error, Plan, Result};

/// The folder of what processes have in work, within the state's folder.
const WORK_DIR: &str = "work";

/// An output directory that others write to as well.
pub(crate) struct Joint {
    root: PathBuf,
    _lock: Lock,
}

/// What there is to do.
pub(crate) enum Joined {
    /// Shards, or some of them.
    Work(Joint),
    /// Nothing: all that was planned is there.
    Complete,
}

impl Joint {
    /// Joins those who write to a directory, or is the first.
    ///
    /// # Errors
    /// It holds something else, or one process alone is writing there.
    pub(crate) fn join(root: &Path, job: Job<'_>, scratch: &Scratch) -> Result<Joined> {
        let allow = Permissions { resume: true, force: false };
        for _ in 0..ATTEMPTS {
            match decide(root, job, allow) {
                Ok(Step::Check(manifest)) => {
                    let same = job.plan.shards.iter().map(|shard| &shard.file).eq(manifest.shards.keys());
                    let layout = || (!same).then(|| "of other shards".to_owned());
                    return match crate::complete::other_origin(&manifest, job)?.or_else(layout) {
                        None => Ok(Joined::Complete),
                        Some(what) => Err(refusal(
                            root,
                            format!("already holds a checkpoint, {what}: choose another output directory"),
                        )),
                    };
                }
                Ok(Step::Replace(_)) => {
                    return Err(refusal(
                        root,
                        "holds a job that was to replace another and was interrupted: remove it or choose another output directory",
                    ));
                }
                Ok(Step::Fresh | Step::Resume) => {}
                // Another began after the first look, and has made something by now.
                Err(e) => {
                    if !is_begun(root, job.plan)? {
                        return Err(e);
                    }
                }
            }
            let Some(lock) = Lock::share(root)? else { continue };
            if is_begun(root, job.plan)? {
                return Ok(Joined::Work(Self { root: root.to_owned(), _lock: lock }));
            }
            match decide(root, job, allow) {
                Ok(Step::Fresh) => {
                    let joint = Self { root: root.to_owned(), _lock: lock };
                    joint.begin(job, scratch)?;
                    // Somebody with another plan may have been faster.
                    is_begun(root, job.plan)?;
                    return Ok(Joined::Work(joint));
                }
                Ok(_) => {}
                Err(e) => {
                    if !is_begun(root, job.plan)? {
                        lock.abandon(root);
                        return Err(e);
                    }
                }
            }
        }
        Err(busy(root))
    }

    /// Writes down what is going to be made. What is there already is another's, and stays.
    fn begin(&self, job: Job<'_>, scratch: &Scratch) -> Result<()> {
        let private = self.private("begin-", scratch)?;
        let journal = Journal { remove: BTreeSet::new(), write: job.names() };
        let saved = |what: &str, e| Error::Invalid(format!("{what}: {e}"));
        let files = [
            (JOURNAL_FILE, serde_json::to_vec(&journal).map_err(|e| saved(JOURNAL_FILE, e))?),
            (PLAN_FILE, serde_json::to_vec_pretty(job.plan).map_err(|e| saved(PLAN_FILE, e))?),
        ];
        for (name, bytes) in files {
            let (own, place) = (private.path().join(name), self.root.join(STATE_DIR).join(name));
            write_atomic(&own, &bytes)?;
            match std::fs::hard_link(&own, &place) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                // A file system without links.
                Err(_) => std::fs::rename(&own, &place).map_err(|e| FormatError::io(&place, "rename", e))?,
            }
            sync_folder_of(&place)?;
        }
        Ok(())
    }

    /// A folder for what one process has in work.
    pub(crate) fn private(&self, prefix: &str, scratch: &Scratch) -> Result<Private> {
        let work = self.root.join(STATE_DIR).join(WORK_DIR);
        match std::fs::create_dir(&work) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(FormatError::io(&work, "create", e).into());
            }
            _ => {}
        }
        if !work.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            return Err(refusal(
                &work,
                "is a link or a file where a folder is needed: remove it or choose another output directory",
            ));
        }
        let folder = scratch.create(|| tempfile::Builder::new().prefix(prefix).tempdir_in(&work));
        let folder = folder.map_err(|e| FormatError::io(&work, "create a folder in", e))?;
        Ok(Private { folder, scratch: scratch.clone() })
    }

    /// Removes what others left, or still have, of a unit that is done.
    pub(crate) fn remove_leftovers(&self, prefix: &str) {
        let work = self.root.join(STATE_DIR).join(WORK_DIR);
        for entry in std::fs::read_dir(work).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)) {
                // Whoever is still at it finds the unit done.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Whether the plan that is carried out at an output is this one; no where none is.
///
/// # Errors
/// It is another one.
pub(crate) fn is_begun(root: &Path, plan: &Plan) -> Result<bool> {
    same_plan(root, plan).map_err(|_| {
        refusal(root, "holds what another plan began: choose another output directory, or remove it")
    })
}

/// A folder that goes when it is dropped.
pub(crate) struct Private {
    folder: TempDir,
    scratch: Scratch,
}

impl Private {
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        self.scratch.forget(self.folder.path());
    }
}

/// Gives a synced file its place.
pub(crate) fn put(own: &Path, place: &Path) -> Result<()> {
    std::fs::rename(own, place).map_err(|e| FormatError::io(place, "rename", e))?;
    sync_folder_of(place)
}

fn sync_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(synced.map_err(|e| FormatError::io(folder, "sync", e))?)
}
