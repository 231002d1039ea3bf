//! What passes have come to so far, kept beside the receipts of shards, so that an interrupted job goes on after it.
//!
//! ```text
//! OUT/.llmpress/passes/1.json     {"fingerprint": source, passes before, text; "ranking": finished or not}
//! ```

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use llmpress_formats::{Error as FormatError, MANIFEST_FILE, STATE_DIR, read_small_file, write_atomic};
use llmpress_prune::Ranking;
use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};

use crate::journal::RESTORED_FILE;
use crate::output::{PASSES_DIR, Permissions, check_state_dir};
use crate::{Error, Result};

const MAX_BYTES: u64 = 64 << 20;

/// The folder for what passes come to; made when there is something to keep.
pub(crate) struct Stage {
    out: PathBuf,
    dir: PathBuf,
    lock: OnceLock<File>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    fingerprint: String,
    ranking: Ranking,
}

impl Stage {
    /// Takes the folder of an output that is new or unfinished. `None` where a finished checkpoint is there, which stays
    /// as it is until all passes are done.
    pub(crate) fn open(out: &Path, allow: Permissions) -> Result<Option<Self>> {
        let refuse = |what: &str| Err(Error::Output { path: out.to_owned(), what: what.to_owned() });
        let state = out.join(STATE_DIR);
        if out.symlink_metadata().is_ok() {
            let has_state = check_state_dir(out)?;
            let complete = [MANIFEST_FILE, RESTORED_FILE].iter().any(|mark| out.join(mark).exists());
            let mut entries = std::fs::read_dir(out).map_err(|e| FormatError::io(out, "read", e))?;
            match (has_state, entries.next().is_none()) {
                (true, _) if allow.resume => {}
                (true, _) if allow.force => return Ok(None),
                (true, _) => {
                    return refuse(
                        "holds an unfinished conversion: use --resume to go on or --force to start over",
                    );
                }
                (false, true) => {}
                (false, false) if allow.force => return Ok(None),
                (false, false) if allow.resume && complete => return Ok(None),
                (false, false) if complete => {
                    return refuse(
                        "already holds a checkpoint: use --force to replace it, or choose another output directory",
                    );
                }
                (false, false) => {
                    return refuse(
                        "exists and was not made by llmpress: choose another output directory or remove it",
                    );
                }
            }
        }
        Ok(Some(Self { out: out.to_owned(), dir: state.join(PASSES_DIR), lock: OnceLock::new() }))
    }

    /// Makes the folder, and keeps others out of it.
    fn take(&self) -> llmpress_formats::Result<()> {
        if self.lock.get().is_some() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.dir).map_err(|e| FormatError::io(&self.dir, "create", e))?;
        // A link might lead elsewhere.
        if !self.dir.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            return Err(FormatError::Invalid(format!(
                "{}: is a link where a folder is needed: remove it or choose another output directory",
                self.dir.display()
            )));
        }
        let path = self.dir.join("lock");
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(|e| FormatError::io(&path, "create", e))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            FormatError::Invalid(format!(
                "{}: another llmpress is writing there: wait for it to end",
                self.out.display()
            ))
        })?;
        self.lock.get_or_init(|| lock);
        Ok(())
    }

    /// Whether anything was kept.
    pub(crate) fn is_taken(&self) -> bool {
        self.lock.get().is_some()
    }

    /// What the pass of this number came to, if it is what the fingerprint stands for.
    pub(crate) fn read(&self, number: usize, fingerprint: &str) -> Option<Ranking> {
        let bytes = read_small_file(&self.path(number), MAX_BYTES).ok()?;
        let kept: Kept = serde_json::from_slice(&bytes).ok()?;
        (kept.fingerprint == fingerprint).then_some(kept.ranking)
    }

    /// Keeps what the pass of this number has come to.
    pub(crate) fn write(
        &self,
        number: usize,
        fingerprint: &str,
        ranking: &Ranking,
    ) -> llmpress_formats::Result<()> {
        self.take()?;
        let kept = Kept { fingerprint: fingerprint.to_owned(), ranking: ranking.clone() };
        let bytes = serde_json::to_vec(&kept)
            .map_err(|e| FormatError::Invalid(format!("the ranking of pass {number}: {e}")))?;
        write_atomic(&self.path(number), &bytes)
    }

    fn path(&self, number: usize) -> PathBuf {
        self.dir.join(format!("{number}.json"))
    }
}
