//! The output directory: who may write to it, and what is already there.
//!
//! ```text
//! absent or empty          -> start
//! has .llmpress/           -> unfinished: --resume goes on if the plan is the same
//! has llmpress.json        -> complete
//! anything else            -> not ours: never touched
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};

use llmpress_formats::{Error as FormatError, INDEX_FILE, MANIFEST_FILE, read_small_file, write_atomic};
use rustix::fs::{FlockOperation, flock, statvfs};

use crate::receipt::STATE_DIR;
use crate::{Error, Plan, Result};

const PLAN_FILE: &str = "plan.json";
const MAX_PLAN_BYTES: u64 = 1 << 30;

/// An output directory that this process owns until it is dropped.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) root: PathBuf,
    _lock: File,
}

/// What the caller allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permissions {
    pub(crate) resume: bool,
    pub(crate) force: bool,
}

impl Output {
    /// Takes the directory, or says why not. `Ok(None)`: a conversion by this plan is complete there.
    pub(crate) fn prepare(
        source: &Path,
        root: &Path,
        plan: &Plan,
        allow: Permissions,
    ) -> Result<Option<Self>> {
        let refuse = |what: String| Err(Error::Output { path: root.to_owned(), what });
        let io = |action| move |e| FormatError::io(root, action, e);
        if root.exists() {
            let real = root.canonicalize().map_err(io("open"))?;
            let source = source.canonicalize().map_err(|e| FormatError::io(source, "open", e))?;
            if source.starts_with(&real) {
                return refuse("is or contains the source: choose another output directory".into());
            }
            if !real.is_dir() {
                return refuse("is a file: choose another output directory".into());
            }
            let state = root.join(STATE_DIR);
            let complete = root.join(MANIFEST_FILE).exists();
            let empty = std::fs::read_dir(root).map_err(io("read"))?.next().is_none();
            match (state.exists(), complete, empty) {
                (_, _, true) => {}
                (true, _, _) if allow.resume => check_plan(root, plan)?,
                (true, _, _) | (_, true, _) if allow.force => {
                    // Taken before anything is removed: another process may be writing there.
                    drop(lock(root)?);
                    remove_own_files(root)?;
                }
                (true, _, _) => {
                    return refuse(
                        "holds an unfinished conversion: use --resume to go on or --force to start over"
                            .into(),
                    );
                }
                (false, true, _) if allow.resume && complete_by(root, plan) => return Ok(None),
                (false, true, _) => {
                    return refuse("already holds a checkpoint: use --force to replace it".into());
                }
                (false, false, false) => {
                    return refuse(
                        "exists and was not made by llmpress: choose another output directory or remove it"
                            .into(),
                    );
                }
            }
        }
        std::fs::create_dir_all(root.join(STATE_DIR)).map_err(io("create"))?;
        let lock = lock(root)?;
        let saved = serde_json::to_vec_pretty(plan).map_err(|e| Error::Invalid(format!("plan: {e}")))?;
        write_atomic(&root.join(STATE_DIR).join(PLAN_FILE), &saved)?;
        Ok(Some(Self { root: root.to_owned(), _lock: lock }))
    }

    /// Refuses to start what the disk cannot hold.
    pub(crate) fn check_space(&self, needed: u64) -> Result<()> {
        let stat = statvfs(&self.root).map_err(|e| FormatError::io(&self.root, "examine", e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < needed {
            return Err(Error::Limit(format!(
                "{}: about {} MB are needed and {} MB are free: free some space and run again with --resume",
                self.root.display(),
                needed.div_ceil(1_000_000),
                free / 1_000_000
            )));
        }
        Ok(())
    }

    /// Removes the state: the conversion is complete.
    pub(crate) fn complete(self) -> Result<()> {
        let state = self.root.join(STATE_DIR);
        std::fs::remove_dir_all(&state).map_err(|e| FormatError::io(&state, "remove", e))?;
        Ok(())
    }
}

/// Removes what a conversion makes and nothing else; copied files are overwritten later.
fn remove_own_files(root: &Path) -> Result<()> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |e| Error::from(FormatError::io(path, "remove", e))
    };
    // First the manifest: without it the directory no longer counts as complete.
    let manifest = root.join(MANIFEST_FILE);
    if manifest.exists() {
        std::fs::remove_file(&manifest).map_err(io(&manifest))?;
    }
    for entry in std::fs::read_dir(root).map_err(io(root))? {
        let path = entry.map_err(io(root))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = name.strip_suffix(".tmp").unwrap_or(name);
        if name == STATE_DIR {
            std::fs::remove_dir_all(&path).map_err(io(&path))?;
        } else if stem == INDEX_FILE || stem.starts_with("model") && stem.ends_with(".safetensors") {
            std::fs::remove_file(&path).map_err(io(&path))?;
        }
    }
    Ok(())
}

fn lock(root: &Path) -> Result<File> {
    let path = root.join(STATE_DIR).join("lock");
    if !root.join(STATE_DIR).exists() {
        // A complete directory: nobody writes to it.
        return File::open(root).map_err(|e| FormatError::io(root, "open", e).into());
    }
    let file = File::create(&path).map_err(|e| FormatError::io(&path, "create", e))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| Error::Output {
        path: root.to_owned(),
        what: "another llmpress is writing there: wait for it to end".into(),
    })?;
    Ok(file)
}

fn check_plan(root: &Path, plan: &Plan) -> Result<()> {
    let path = root.join(STATE_DIR).join(PLAN_FILE);
    // Killed before the plan was there: nothing was made yet.
    let Ok(bytes) = read_small_file(&path, MAX_PLAN_BYTES) else { return Ok(()) };
    let saved = serde_json::from_slice::<Plan>(&bytes).ok().map(|p| p.fingerprint);
    if saved.as_deref() == Some(&plan.fingerprint) {
        return Ok(());
    }
    Err(Error::Output {
        path: root.to_owned(),
        what: "cannot resume: the source, the recipe or llmpress changed since it was started; use --force to start over"
            .into(),
    })
}

/// Whether the complete checkpoint there came from the same recipe and the same logical tensors.
fn complete_by(root: &Path, plan: &Plan) -> bool {
    let Ok(done) = llmpress_formats::Checkpoint::open(root) else { return false };
    let recipe = serde_json::to_value(&plan.recipe).ok();
    let names: std::collections::BTreeSet<&str> =
        plan.units().flat_map(|u| &u.tensors).map(String::as_str).collect();
    done.manifest().is_some_and(|m| Some(&m.recipe) == recipe.as_ref())
        && done.tensors().keys().map(String::as_str).eq(names)
}
