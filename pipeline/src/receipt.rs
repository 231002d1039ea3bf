//! Receipts: what a finished shard holds, so that an interrupted conversion goes on after it.
//!
//! ```text
//! OUT/.llmpress/plan.json             the plan that is being carried out
//! OUT/.llmpress/<shard>.json          digest of the rest, then the rest: written after its shard was synced and named
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use llmpress_formats::{Digest, STATE_DIR, ShardEntry, UnitEntry, read_small_file, write_atomic};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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
    /// Its stored tensors and their sizes.
    pub(crate) stored: BTreeMap<String, u64>,
    /// Its units.
    pub(crate) units: BTreeMap<String, UnitEntry>,
    /// Digest of each logical tensor.
    pub(crate) tensors: BTreeMap<String, Digest>,
}

fn path(out: &Path, file: &str) -> PathBuf {
    out.join(STATE_DIR).join(format!("{file}.json"))
}

impl Receipt {
    /// Writes the receipt of `file`.
    pub(crate) fn write(&self, out: &Path, file: &str) -> Result<()> {
        let json = serde_json::to_vec(self).map_err(|e| Error::Invalid(format!("receipt: {e}")))?;
        let mut bytes = format!("{}\n", Digest::of(&json)).into_bytes();
        bytes.extend(json);
        Ok(write_atomic(&path(out, file), &bytes)?)
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
