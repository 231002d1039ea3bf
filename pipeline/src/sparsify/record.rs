//! The record of a pass that makes matrices 2:4, as a file of the output.
//!
//! ```text
//! sparsity.jsonl   a line for each matrix whose form was chosen, for each sub-layer that was reconstructed, and for each
//!                  matrix that could not but stay dense
//! ```
//!
//! It holds no times: kept with each block's receipt, it is the same bytes after any number of interruptions.

use std::collections::BTreeMap;

use llmpress_sparsify::{Dense, Lesson};
use serde::{Deserialize, Serialize};

use super::partly;
use crate::{Error, Result};

/// The name of the record.
pub(crate) const SPARSITY_FILE: &str = "sparsity.jsonl";

/// A line of it.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    /// A matrix whose form was chosen.
    Settled(partly::Line),
    /// A sub-layer.
    Lesson(Lesson),
    /// A matrix that stayed dense.
    Dense(Dense),
}

/// The file by its name; none where there is nothing to tell.
pub(crate) fn files(settled: Vec<partly::Line>, lines: Vec<Line>) -> Result<BTreeMap<String, Vec<u8>>> {
    if settled.is_empty() && lines.is_empty() {
        return Ok(BTreeMap::new());
    }
    let mut bytes = Vec::new();
    for line in settled.into_iter().map(Line::Settled).chain(lines) {
        serde_json::to_writer(&mut bytes, &line)
            .map_err(|e| Error::Invalid(format!("{SPARSITY_FILE}: {e}")))?;
        bytes.push(b'\n');
    }
    Ok(BTreeMap::from([(SPARSITY_FILE.to_owned(), bytes)]))
}
