//! What passes have come to so far, kept beside the receipts of shards, so that an interrupted job goes on after it.
//!
//! ```text
//! OUT/.llmpress/passes/1.json     {"fingerprint": source, passes before, text; "ranking": finished or not}
//! OUT/.llmpress/passes/2/         finished units of a quantiser, block by block
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
    /// Nothing of an earlier run counts.
    anew: bool,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    fingerprint: String,
    ranking: Ranking,
}

impl Stage {
    /// Takes the folder of an output that is new or unfinished, or is to be replaced. `None` where a finished checkpoint is
    /// there, which stays as it is until all passes are done; with `needed`, the folder is put beside it.
    pub(crate) fn open(out: &Path, allow: Permissions, needed: bool) -> Result<Option<Self>> {
        let made = |anew| {
            let dir = out.join(STATE_DIR).join(PASSES_DIR);
            Ok(Some(Self { out: out.to_owned(), dir, lock: OnceLock::new(), anew }))
        };
        let refuse = |what: &str| Err(Error::Output { path: out.to_owned(), what: what.to_owned() });
        if out.symlink_metadata().is_ok() {
            let has_state = check_state_dir(out)?;
            let complete = [MANIFEST_FILE, RESTORED_FILE].iter().any(|mark| out.join(mark).exists());
            let mut entries = std::fs::read_dir(out).map_err(|e| FormatError::io(out, "read", e))?;
            match (has_state, entries.next().is_none()) {
                (true, _) if allow.resume => {}
                (true, _) if allow.force && needed => return made(true),
                (true, _) if allow.force => return Ok(None),
                (true, _) => {
                    return refuse(
                        "holds an unfinished conversion: use --resume to go on or --force to start over",
                    );
                }
                (false, true) => {}
                (false, false) if allow.force && needed && complete => return made(true),
                (false, false) if allow.force && !needed => return Ok(None),
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
        made(false)
    }

    /// The folder of the pass of this number, made and kept from others.
    pub(crate) fn folder(&self, number: usize) -> Result<PathBuf> {
        self.take()?;
        let dir = self.dir.join(number.to_string());
        if self.anew && dir.symlink_metadata().is_ok() {
            std::fs::remove_dir_all(&dir).map_err(|e| FormatError::io(&dir, "remove", e))?;
        }
        match std::fs::create_dir(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(FormatError::io(&dir, "create", e).into());
            }
            _ => {}
        }
        if !dir.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            return Err(Error::Output {
                path: dir,
                what: "is a link or a file where a folder is needed: remove it or choose another output directory".to_owned(),
            });
        }
        Ok(dir)
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
        if self.anew {
            return None;
        }
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
