//! The fingerprint of a conversion: what its output depends on, as far as headers tell.
//!
//! ```text
//! BLAKE3( versions, recipe, shard bound, finished units, every file of the source: name, size, time of change, header )
//! ```

use std::os::unix::fs::{FileExt, MetadataExt};

use llmpress_formats::{Checkpoint, Digest, Error as FormatError, FORMAT_VERSION, open_file};

use crate::carried::carried;
use crate::{Error, Plan, Recipe, Result};

/// Bytes of each file that are read: enough for any change that a header shows.
const HEAD: usize = 64 << 10;

pub(crate) fn fingerprint(checkpoint: &Checkpoint, recipe: &Recipe, max_shard_bytes: u64) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(env!("CARGO_PKG_VERSION").as_bytes());
    field(format!("{}.{}", FORMAT_VERSION.0, FORMAT_VERSION.1).as_bytes());
    let recipe = serde_json::to_vec(recipe).map_err(|e| Error::Invalid(format!("recipe: {e}")))?;
    field(&recipe);
    field(&max_shard_bytes.to_le_bytes());
    // What passes finished is not among the source's files.
    for (name, entry) in checkpoint.finished() {
        field(name.as_bytes());
        for (component, link) in entry.components.iter() {
            field(component.as_bytes());
            field(&link.blake3.0);
        }
    }
    for (name, path) in crate::source::files(checkpoint, &carried(checkpoint)?) {
        let io = |e| FormatError::io(&path, "read", e);
        let file = open_file(&path)?;
        let meta = file.metadata().map_err(io)?;
        field(name.as_bytes());
        field(&meta.len().to_le_bytes());
        field(&meta.mtime().to_le_bytes());
        field(&meta.mtime_nsec().to_le_bytes());
        let mut head = vec![0; HEAD.min(meta.len() as usize)];
        file.read_exact_at(&mut head, 0).map_err(io)?;
        field(&head);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The fingerprint of a conversion that makes what another tool reads.
pub(crate) fn with_settings(fingerprint: String, settings: Option<&serde_json::Value>) -> String {
    match settings {
        Some(settings) => Digest::of(format!("{fingerprint} {settings}").as_bytes()).to_string(),
        None => fingerprint,
    }
}

/// Refuses a source that is no longer the one that was planned for: what was made of it would be a mixture.
pub(crate) fn check_unchanged(checkpoint: &Checkpoint, plan: &Plan) -> Result<()> {
    checkpoint.check_unchanged()?;
    let now = fingerprint(checkpoint, &plan.recipe, plan.max_shard_bytes)?;
    if with_settings(now, plan.quantization_config.as_ref()) == plan.fingerprint {
        return Ok(());
    }
    Err(FormatError::corrupt(
        checkpoint.root(),
        None,
        "was changed while it was converted, so what was made is a mixture: let nobody write to it and start over with --force",
    )
    .into())
}
