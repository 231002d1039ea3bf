//! The fingerprint of a conversion: what its output depends on, as far as headers tell.
//!
//! ```text
//! BLAKE3( versions, recipe, shard bound, finished units, every file of the source: name, size, time of change, header; the base's name and
//!         shards likewise )
//! ```

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

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
        field(name.as_bytes());
        file(&path, &mut field)?;
    }
    if let Some(base) = checkpoint.stored_by() {
        field(b"base");
        field(base.name().as_bytes());
        let shards = base.checkpoint().map(|base| base.directory().shards()).unwrap_or_default();
        shards.iter().try_for_each(|shard| file(shard.path(), &mut field))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// What of a file tells that it is the same.
fn file(path: &Path, field: &mut impl FnMut(&[u8])) -> Result<()> {
    let io = |e| FormatError::io(path, "read", e);
    let file = open_file(path)?;
    let meta = file.metadata().map_err(io)?;
    field(&meta.len().to_le_bytes());
    field(&meta.mtime().to_le_bytes());
    field(&meta.mtime_nsec().to_le_bytes());
    let mut head = vec![0; HEAD.min(meta.len() as usize)];
    file.read_exact_at(&mut head, 0).map_err(io)?;
    field(&head);
    Ok(())
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
    checkpoint.stored_by().and_then(|base| base.checkpoint()).map_or(Ok(()), Checkpoint::check_unchanged)?;
    let now = fingerprint(checkpoint, &plan.recipe, plan.max_shard_bytes)?;
    if with_settings(now, plan.quantization_config.as_ref()) == plan.fingerprint {
        return Ok(());
    }
    Err(FormatError::corrupt(
        checkpoint.root(),
        None,
        "was changed while it was converted, it or its base, so what was made is a mixture: let nobody write to it and start over with --force",
    )
    .into())
}
