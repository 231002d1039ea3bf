//! Receipts: what a finished shard holds, so that an interrupted conversion goes on after it.
//!
//! ```text
//! OUT/.llmpress/plan.json             the plan that is being carried out
//! OUT/.llmpress/<shard>.json          digest of the rest, then the rest: written after its shard was synced and named
//! ```

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use llmpress_formats::{
    Digest, Error as FormatError, STATE_DIR, ShardEntry, UnitEntry, read_small_file, write_atomic_with,
    write_json,
};
use serde::{Deserialize, Serialize};

use crate::Result;

const MAX_RECEIPT_BYTES: u64 = 1 << 30;
/// Digits of the digest that a receipt begins with.
const DIGITS: usize = 64;

/// A finished shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Receipt {
    /// The plan's fingerprint.
    pub(crate) fingerprint: String,
    /// The shard.
    pub(crate) shard: ShardEntry,
    /// Bytes of its stored tensors.
    pub(crate) stored_bytes: u64,
    /// Its units.
    pub(crate) units: BTreeMap<String, UnitEntry>,
    /// Digest of each logical tensor.
    pub(crate) tensors: BTreeMap<String, Digest>,
}

pub(crate) fn path(out: &Path, file: &str) -> PathBuf {
    out.join(STATE_DIR).join(format!("{file}.json"))
}

impl Receipt {
    /// Writes the receipt of `file`.
    pub(crate) fn write(&self, out: &Path, file: &str) -> Result<()> {
        self.write_to(&path(out, file))
    }

    /// Writes the receipt to a file of this name.
    pub(crate) fn write_to(&self, path: &Path) -> Result<()> {
        Ok(write_atomic_with(path, |file| {
            let first = (DIGITS + 1) as u64;
            let written = write_json(file, path, first, |out| serde_json::to_writer(out, self))?;
            let line = format!("{}\n", written.digest);
            file.write_all_at(line.as_bytes(), 0).map_err(|e| FormatError::io(path, "write", e))
        })?)
    }

    /// The receipt of `file` if its shard is finished and is still what the receipt says.
    pub(crate) fn read(out: &Path, file: &str, fingerprint: &str) -> Option<Self> {
        let bytes = read_small_file(&path(out, file), MAX_RECEIPT_BYTES).ok()?;
        let (digest, json) = bytes.split_at_checked(DIGITS + 1)?;
        if digest != format!("{}\n", Digest::of(json)).as_bytes() {
            return None;
        }
        let receipt: Self = serde_json::from_slice(json).ok()?;
        let shard = std::fs::metadata(out.join(file)).ok()?;
        (receipt.fingerprint == fingerprint && shard.len() == receipt.shard.bytes).then_some(receipt)
    }
}
