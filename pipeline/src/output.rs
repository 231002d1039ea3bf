//! The output directory: who may write to it, and what is already there.
//!
//! ```text
//! absent or empty          -> start
//! has .llmpress/           -> unfinished: --resume goes on if the plan is the same
//! has llmpress.json        -> complete: --resume checks that it is what the job would make
//! anything else            -> not ours: never touched
//! ```
//!
//! All of it is looked at twice: before anything is touched, and again under the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use llmpress_formats::{
    Error as FormatError, MANIFEST_FILE, Manifest, STATE_DIR, is_temporary_name, read_small_file,
    write_atomic,
};
use rustix::fs::{FlockOperation, OFlags, flock};
use serde::Deserialize;

use crate::job::Job;
use crate::journal::{JOURNAL_FILE, Journal, RESTORED_FILE};
use crate::{Error, Plan, Progress, Result};

/// What passes came to, within the state's folder.
pub(crate) const PASSES_DIR: &str = "passes";
pub(crate) const PLAN_FILE: &str = "plan.json";
const LOCK_FILE: &str = "lock";
const MAX_PLAN_BYTES: u64 = 1 << 30;
/// How often the lock is tried for while others come and go.
pub(crate) const ATTEMPTS: u32 = 100;

/// An output directory that this process owns until it is dropped.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) root: PathBuf,
    /// Files of an earlier job that were removed.
    pub(crate) removed: Vec<String>,
    _lock: File,
}

/// What the caller allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permissions {
    pub(crate) resume: bool,
    pub(crate) force: bool,
}

/// What there is to do.
#[derive(Debug)]
pub(crate) enum Prepared {
    /// The work, or what is left of it.
    Work(Output),
    /// Nothing: what this job would make is there. Its manifest.
    Complete(Box<Manifest>),
}

/// What is to become of what is there.
pub(crate) enum Step {
    Fresh,
    Resume,
    Replace(BTreeSet<String>),
    Check(Box<Manifest>),
}

/// What is there.
enum Found {
    Nothing,
    Unfinished(Journal),
    Complete(Box<Manifest>, &'static str),
    Damaged(FormatError),
    Foreign,
}

impl Output {
    /// Takes the directory, or says why not.
    pub(crate) fn prepare(
        root: &Path,
        job: Job<'_>,
        allow: Permissions,
        progress: &dyn Progress,
    ) -> Result<Prepared> {
        for _ in 0..ATTEMPTS {
            // A directory that is refused is left as it is.
            if let Step::Check(manifest) = decide(root, job, allow)? {
                if let Some(difference) = crate::complete::difference(root, &manifest, job, progress)? {
                    return Err(refusal(
                        root,
                        format!(
                            "already holds a checkpoint, {difference}: use --force to replace it, or choose another output directory"
                        ),
                    ));
                }
                if root.join(STATE_DIR).is_dir()
                    && let Some(lock) = Lock::take(root)?
                {
                    // Its run was killed when only this was left to do.
                    lock.into_output(root).complete()?;
                }
                return Ok(Prepared::Complete(manifest));
            }
            let Some(lock) = Lock::take(root)? else { continue };
            match decide(root, job, allow) {
                Ok(Step::Check(_)) => lock.abandon(root),
                Ok(step) => return Ok(Prepared::Work(lock.into_output(root).start(step, job)?)),
                Err(e) => {
                    lock.abandon(root);
                    return Err(e);
                }
            }
        }
        Err(busy(root))
    }

    /// Clears the way and writes down what is going to be made.
    fn start(mut self, step: Step, job: Job<'_>) -> Result<Self> {
        if let Step::Replace(names) = step {
            Journal { remove: names.clone(), write: BTreeSet::new() }.write(&self.root)?;
            // Units that the passes of this job finished stay.
            let passes = self.root.join(STATE_DIR).join(PASSES_DIR);
            let used = job.checkpoint.finished_shards().any(|shard| shard.starts_with(&passes));
            let kept = [LOCK_FILE, JOURNAL_FILE, PASSES_DIR];
            clear_state(&self.root, if used { &kept } else { &kept[..2] })?;
            self.removed = remove(&self.root, names)?;
        } else if matches!(step, Step::Resume) {
            return Ok(self);
        } else {
            // What the passes of this job came to stays.
            clear_state(&self.root, &[LOCK_FILE, PASSES_DIR])?;
        }
        Journal { remove: BTreeSet::new(), write: job.names() }.write(&self.root)?;
        let saved = serde_json::to_vec_pretty(job.plan).map_err(|e| Error::Invalid(format!("plan: {e}")))?;
        write_atomic(&self.root.join(STATE_DIR).join(PLAN_FILE), &saved)?;
        Ok(self)
    }

    /// Refuses to start what the disk cannot hold.
    pub(crate) fn check_space(&self, needed: u64) -> Result<()> {
        crate::space::check(&self.root, needed)
    }

    /// Removes the state: the conversion is complete. What says so goes last.
    pub(crate) fn complete(self) -> Result<()> {
        let state = self.root.join(STATE_DIR);
        clear_state(&self.root, &[LOCK_FILE, JOURNAL_FILE])?;
        clear_state(&self.root, &[LOCK_FILE])?;
        clear_state(&self.root, &[])?;
        match std::fs::remove_dir(&state) {
            // Another process looks whether there is something to do, and will find that there is not.
            Err(e) if e.kind() != std::io::ErrorKind::DirectoryNotEmpty => {
                Err(FormatError::io(&state, "remove", e).into())
            }
            _ => Ok(()),
        }
    }
}

/// The lock of an output directory.
pub(crate) struct Lock {
    file: File,
    /// Whether the state's folder was made for it.
    created: bool,
}

impl Lock {
    /// Takes it alone. `None` if the folder went away meanwhile: look again.
    fn take(root: &Path) -> Result<Option<Self>> {
        Self::take_as(root, FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes it with others that share it, where the file system has locks.
    pub(crate) fn share(root: &Path) -> Result<Option<Self>> {
        Self::take_as(root, FlockOperation::NonBlockingLockShared)
    }

    fn take_as(root: &Path, operation: FlockOperation) -> Result<Option<Self>> {
        use rustix::io::Errno;
        let shared = operation == FlockOperation::NonBlockingLockShared;
        std::fs::create_dir_all(root).map_err(|e| FormatError::io(root, "create", e))?;
        let state = root.join(STATE_DIR);
        let created = match std::fs::create_dir(&state) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(FormatError::io(&state, "create", e).into()),
        };
        check_state_dir(root)?;
        let path = state.join(LOCK_FILE);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path);
        let file = match opened {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| FormatError::io(&path, "create", e))?,
        };
        match flock(&file, operation) {
            Ok(()) => {}
            // Who shares it only tells others that they are not alone: nothing of theirs goes wrong without.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) if shared => {}
            Err(Errno::WOULDBLOCK) => return Err(busy(root)),
            Err(e) => return Err(FormatError::io(&path, "lock", e.into()).into()),
        }
        // The last owner may have removed the file between our opening and locking it.
        let place = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let own = file.metadata().map(place).map_err(|e| FormatError::io(&path, "examine", e))?;
        let named = path.symlink_metadata().map(place).ok();
        Ok((named == Some(own)).then_some(Self { file, created }))
    }

    fn into_output(self, root: &Path) -> Output {
        Output { root: root.to_owned(), removed: Vec::new(), _lock: self.file }
    }

    /// Leaves the directory as it was.
    pub(crate) fn abandon(self, root: &Path) {
        if self.created {
            let state = root.join(STATE_DIR);
            // Whatever fails here fails because another process uses it.
            let _ = std::fs::remove_file(state.join(LOCK_FILE));
            let _ = std::fs::remove_dir(state);
        }
    }
}

/// Whether a run is at work on an unfinished output.
fn is_locked(root: &Path) -> bool {
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(root.join(STATE_DIR).join(LOCK_FILE));
    file.is_ok_and(|file| {
        flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
    })
}

pub(crate) fn refusal(root: &Path, what: impl Into<String>) -> Error {
    Error::Output { path: root.to_owned(), what: what.into() }
}

pub(crate) fn busy(root: &Path) -> Error {
    Error::Busy { path: root.to_owned() }
}

/// What to do with a directory, or why nothing.
pub(crate) fn decide(root: &Path, job: Job<'_>, allow: Permissions) -> Result<Step> {
    if root.symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(Step::Fresh);
    }
    let real = root.canonicalize().map_err(|e| FormatError::io(root, "open", e))?;
    if !real.is_dir() {
        return Err(refusal(root, "is a file: choose another output directory"));
    }
    keep_apart(root, &real, job)?;
    let step = match look(root)? {
        Found::Nothing => Step::Fresh,
        Found::Unfinished(journal) if allow.force => Step::Replace(journal.all()),
        Found::Unfinished(journal) if allow.resume => {
            if !journal.remove.is_empty() {
                Step::Replace(journal.remove)
            } else if same_plan(root, job.plan)? {
                return Ok(Step::Resume);
            } else {
                Step::Fresh
            }
        }
        Found::Unfinished(_) if is_locked(root) => return Err(busy(root)),
        Found::Unfinished(_) => {
            return Err(refusal(
                root,
                "holds an unfinished conversion: use --resume to go on or --force to start over",
            ));
        }
        Found::Complete(manifest, last) if allow.force => {
            Step::Replace(manifest.file_names().cloned().chain([last.to_owned()]).collect())
        }
        Found::Complete(manifest, last) if allow.resume && last == job.last_file() => {
            return Ok(Step::Check(manifest));
        }
        Found::Complete(..) => {
            return Err(refusal(
                root,
                "already holds a checkpoint: use --force to replace it, or choose another output directory",
            ));
        }
        Found::Damaged(e) => {
            return Err(refusal(
                root,
                format!(
                    "already holds a checkpoint, and nobody can say which of its files a job made ({e}): remove it or choose another output directory"
                ),
            ));
        }
        Found::Foreign => {
            return Err(refusal(
                root,
                "exists and was not made by llmpress: choose another output directory or remove it",
            ));
        }
    };
    let none = BTreeSet::new();
    let removed = if let Step::Replace(names) = &step { names } else { &none };
    keep_source_files(root, removed, job)?;
    // A person's own file is not overwritten, whatever its name.
    let stays = |name: &String| match root.join(name).symlink_metadata() {
        Ok(meta) => meta.is_dir() || !removed.contains(name),
        Err(_) => false,
    };
    let in_the_way = job.names().into_iter().find(stays);
    match in_the_way {
        None => Ok(step),
        Some(name) => Err(refusal(
            root.join(name).as_path(),
            "is in the way: no earlier job made it, and this one needs the name; move it elsewhere",
        )),
    }
}

fn look(root: &Path) -> Result<Found> {
    let has_state = check_state_dir(root)?;
    let marks = [MANIFEST_FILE, RESTORED_FILE];
    let exists = |name: &str| root.join(name).symlink_metadata().is_ok();
    if has_state {
        match Journal::read(root)? {
            Some(journal) => {
                let written = marks.iter().any(|mark| journal.write.contains(*mark) && exists(mark));
                if !journal.remove.is_empty() || !written {
                    return Ok(Found::Unfinished(journal));
                }
            }
            None => {
                if let Some(plan) = SavedPlan::read(root) {
                    return Ok(Found::Unfinished(Journal::of_shards(
                        plan.shards.into_iter().map(|s| s.file),
                    )));
                }
            }
        }
    }
    for mark in marks {
        match Manifest::read_named(&root.join(mark)) {
            Ok(Some(manifest)) => return Ok(Found::Complete(Box::new(manifest), mark)),
            Ok(None) => {}
            Err(e) => return Ok(Found::Damaged(e)),
        }
    }
    for entry in std::fs::read_dir(root).map_err(|e| FormatError::io(root, "read", e))? {
        let name = entry.map_err(|e| FormatError::io(root, "read", e))?.file_name();
        if name.to_str().is_none_or(|name| name != STATE_DIR && !is_temporary_name(name)) {
            return Ok(Found::Foreign);
        }
    }
    Ok(Found::Nothing)
}

/// Whether there is a state's folder; what else has its name is refused, for it might lead elsewhere.
pub(crate) fn check_state_dir(root: &Path) -> Result<bool> {
    match root.join(STATE_DIR).symlink_metadata() {
        Ok(meta) if meta.is_dir() => Ok(true),
        Ok(_) => Err(refusal(
            &root.join(STATE_DIR),
            "is a link or a file where a folder is needed: remove it or choose another output directory",
        )),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(FormatError::io(root, "examine", e).into()),
    }
}

/// Refuses an output that holds the source, or files that the source consists of by links.
fn keep_apart(root: &Path, real: &Path, job: Job<'_>) -> Result<()> {
    let source = job.checkpoint.root();
    let resolved = source.canonicalize().map_err(|e| FormatError::io(source, "open", e))?;
    if resolved.starts_with(real) {
        return Err(refusal(root, "is or contains the source: choose another output directory"));
    }
    for (name, path) in crate::source::files(job.checkpoint, job.carried) {
        let file = path.canonicalize().map_err(|e| FormatError::io(&path, "open", e))?;
        if file.starts_with(real) {
            return Err(refusal(
                root,
                format!("holds {name} of the source, which is a link to it: choose another output directory"),
            ));
        }
    }
    Ok(())
}

/// Refuses to remove what is also a file of the source, by whatever path.
fn keep_source_files(root: &Path, names: &BTreeSet<String>, job: Job<'_>) -> Result<()> {
    let place = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    let source: BTreeMap<(u64, u64), String> = crate::source::files(job.checkpoint, job.carried)
        .into_iter()
        .filter_map(|(name, path)| Some((place(std::fs::metadata(path).ok()?), name)))
        .collect();
    for name in names {
        let found = root.join(name).symlink_metadata().ok().and_then(|meta| source.get(&place(meta)));
        if let Some(of_source) = found {
            return Err(refusal(
                root,
                format!("its {name} is also {of_source} of the source: choose another output directory"),
            ));
        }
    }
    Ok(())
}

/// What of a saved plan tells whether a run may go on with it.
#[derive(Deserialize)]
struct SavedPlan {
    fingerprint: String,
    shards: Vec<SavedShard>,
}

#[derive(Deserialize)]
struct SavedShard {
    file: String,
}

impl SavedPlan {
    fn read(root: &Path) -> Option<Self> {
        let bytes = read_small_file(&root.join(STATE_DIR).join(PLAN_FILE), MAX_PLAN_BYTES).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

/// Whether the saved plan is this one; no where the run was killed before it had saved it.
pub(crate) fn same_plan(root: &Path, plan: &Plan) -> Result<bool> {
    match SavedPlan::read(root) {
        None => Ok(false),
        Some(saved) if saved.fingerprint == plan.fingerprint => Ok(true),
        Some(_) => Err(refusal(
            root,
            "cannot resume: the source, the recipe or llmpress changed since it was started; use --force to start over",
        )),
    }
}

/// Removes everything in the state's folder but these files.
fn clear_state(root: &Path, kept: &[&str]) -> Result<()> {
    let state = root.join(STATE_DIR);
    for entry in std::fs::read_dir(&state).map_err(|e| FormatError::io(&state, "read", e))? {
        let entry = entry.map_err(|e| FormatError::io(&state, "read", e))?;
        if entry.file_name().to_str().is_some_and(|name| kept.contains(&name)) {
            continue;
        }
        let path = entry.path();
        let folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let gone = if folder { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        gone.map_err(|e| FormatError::io(&path, "remove", e))?;
    }
    Ok(())
}

/// Removes the files of an earlier job, and what its interrupted writes left. Links are removed, not followed; folders
/// are never an earlier job's.
fn remove(root: &Path, names: BTreeSet<String>) -> Result<Vec<String>> {
    let mut temporary = Vec::new();
    for entry in std::fs::read_dir(root).map_err(|e| FormatError::io(root, "read", e))? {
        let name = entry.map_err(|e| FormatError::io(root, "read", e))?.file_name();
        temporary.extend(name.to_str().filter(|name| is_temporary_name(name)).map(str::to_owned));
    }
    // First what says that the directory is complete.
    let (marks, others): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| name == MANIFEST_FILE || name == RESTORED_FILE);
    let mut removed = Vec::new();
    for name in marks.into_iter().chain(others).chain(temporary) {
        let path = root.join(&name);
        if path.symlink_metadata().is_ok_and(|meta| !meta.is_dir()) {
            std::fs::remove_file(&path).map_err(|e| FormatError::io(&path, "remove", e))?;
            removed.push(name);
        }
    }
    File::open(root).and_then(|dir| dir.sync_all()).map_err(|e| FormatError::io(root, "sync", e))?;
    removed.sort();
    Ok(removed)
}
