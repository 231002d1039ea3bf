//! What a job makes and removes at its output, written down before it does either.
//!
//! ```text
//! OUT/.llmpress/files.json   {"remove": [...], "write": [...]}
//! ```
//!
//! A name under `remove` is an earlier job's and goes before anything is written; a run that is killed meanwhile is
//! finished by the next one. A name under `write` is this job's: `--force` may remove it later, and nothing else.

use std::collections::BTreeSet;
use std::path::Path;

use llmpress_formats::{
    CONFIG_FILE, Error as FormatError, INDEX_FILE, MANIFEST_FILE, STATE_DIR, read_small_file, write_atomic,
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a restored checkpoint has in place of a manifest, hidden so that it stays a plain one.
pub(crate) const RESTORED_FILE: &str = ".llmpress-restored.json";
pub(crate) const JOURNAL_FILE: &str = "files.json";
const MAX_BYTES: u64 = 64 << 20;

/// The names.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Journal {
    pub(crate) remove: BTreeSet<String>,
    pub(crate) write: BTreeSet<String>,
}

impl Journal {
    /// What an unfinished job wrote down; `None` if it had not come so far.
    pub(crate) fn read(root: &Path) -> Result<Option<Self>> {
        let path = root.join(STATE_DIR).join(JOURNAL_FILE);
        let bytes = match read_small_file(&path, MAX_BYTES) {
            Err(FormatError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let journal: Self = serde_json::from_slice(&bytes).map_err(|e| {
            FormatError::corrupt(
                &path,
                None,
                format!("does not say what was made here: {e}; remove the directory"),
            )
        })?;
        let names = || journal.remove.iter().chain(&journal.write);
        if let Some(name) = names().find(|name| name.contains('/') || *name == ".." || *name == ".") {
            return Err(
                FormatError::corrupt(&path, None, format!("names {name:?}, which is no file here")).into()
            );
        }
        Ok(Some(journal))
    }

    /// What a job by this plan makes, where an earlier version wrote down the plan alone.
    pub(crate) fn of_shards(shards: impl Iterator<Item = String>) -> Self {
        let own = [INDEX_FILE, MANIFEST_FILE, CONFIG_FILE].map(str::to_owned);
        Self { remove: BTreeSet::new(), write: shards.filter(|s| !s.contains('/')).chain(own).collect() }
    }

    pub(crate) fn write(&self, root: &Path) -> Result<()> {
        let bytes = serde_json::to_vec(self).map_err(|e| Error::Invalid(format!("{JOURNAL_FILE}: {e}")))?;
        Ok(write_atomic(&root.join(STATE_DIR).join(JOURNAL_FILE), &bytes)?)
    }

    /// Every name.
    pub(crate) fn all(self) -> BTreeSet<String> {
        self.remove.into_iter().chain(self.write).collect()
    }
}
