//! Whether a complete output is what a job would make: nothing is believed that can be looked at.
//!
//! ```text
//! recipe, version, layout, source's files      by the manifest
//! output: every file, header and component     hashed
//! source: every tensor                         hashed, unless a manifest of its own says what it is
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use llmpress_formats::{
    Checkpoint, Digest, Directory, Encoding, Error as FormatError, FORMAT_VERSION, FileEntry, Manifest,
    Source,
};
use rayon::prelude::*;

use crate::job::Job;
use crate::progress::Silent;
use crate::{Progress, Result};

/// Bytes that are hashed at a time.
const PIECE: usize = 1 << 20;
/// The largest file beside the shards: an index or a manifest.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// How a complete output differs from what the job would make, as the end of a sentence; `None` if it does not.
pub(crate) fn difference(
    root: &Path,
    manifest: &Manifest,
    job: Job<'_>,
    progress: &dyn Progress,
) -> Result<Option<String>> {
    if let Some(what) = other_origin(manifest, job)? {
        return Ok(Some(what));
    }
    if let Some(file) = job.plan.single_file() {
        return crate::gguf::difference(root, manifest, job, file);
    }
    // What is damaged need not open, and then says so itself.
    let done = match Directory::open_files(root, manifest.shards.keys()) {
        Ok(done) => done,
        Err(e) => return Ok(Some(damaged(&e))),
    };
    if !same_layout(manifest, &done, job) {
        return Ok(Some("made with another --max-shard-size or other tensors".to_owned()));
    }
    let stored: u64 = manifest.shards.values().map(|s| s.bytes).fold(0, u64::saturating_add);
    progress.start(stored.saturating_add(job.plan.source_bytes));
    if let Some(what) = damage(root, manifest, &done, progress) {
        return Ok(Some(what));
    }
    match other_tensor(job.checkpoint, manifest, progress)? {
        None => other_base(job.checkpoint, manifest),
        other => Ok(other),
    }
}

/// The same of what it was made from, and by: as far as the manifest tells, without a look at the output.
pub(crate) fn other_origin(manifest: &Manifest, job: Job<'_>) -> Result<Option<String>> {
    let recipe = serde_json::to_value(&job.plan.recipe).ok();
    if recipe.as_ref() != Some(&manifest.recipe) {
        return Ok(Some("made by another recipe".to_owned()));
    }
    if manifest.producer.version != env!("CARGO_PKG_VERSION") {
        return Ok(Some(format!("made by llmpress {}", manifest.producer.version)));
    }
    if manifest.format_version != format!("{}.{}", FORMAT_VERSION.0, FORMAT_VERSION.1) {
        return Ok(Some(format!("made in version {} of the format", manifest.format_version)));
    }
    let source = crate::source::describe(job.checkpoint, job.carried)?;
    if let Some(what) = other_source(&manifest.source, &source) {
        return Ok(Some(format!("made from another source ({what})")));
    }
    let base = job.checkpoint.stored_by().map(|base| base.name());
    match (base, manifest.base.as_ref().map(|base| base.name.as_str())) {
        (Some(base), Some(other)) if base != other => {
            return Ok(Some(format!("made with another base ({other})")));
        }
        (None, Some(other)) => return Ok(Some(format!("made as its difference from {other}"))),
        _ => {}
    }
    for (name, bytes) in job.extra_files {
        if manifest.files.get(name).is_none_or(|entry| entry.blake3 != Digest::of(bytes)) {
            return Ok(Some(format!("made with another {name}")));
        }
    }
    Ok(None)
}

/// The name of the directory does not count: it may have been moved.
fn other_source(a: &Source, b: &Source) -> Option<String> {
    if a.kind != b.kind {
        return Some(format!("a {} checkpoint", a.kind));
    }
    fn first<T: PartialEq>(a: &BTreeMap<String, T>, b: &BTreeMap<String, T>) -> Option<String> {
        let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        names.into_iter().find(|name| a.get(*name) != b.get(*name)).cloned()
    }
    let name = first(&a.files, &b.files).or_else(|| first(&a.shards, &b.shards))?;
    Some(format!("its {name} was another"))
}

/// Whether every tensor is where the plan has it.
fn same_layout(manifest: &Manifest, done: &Directory, job: Job<'_>) -> bool {
    let planned: usize = job.plan.units().map(|u| u.tensors.len()).sum();
    let in_file = |tensor: &String, file: &str| {
        let unit = manifest.tensors.get(tensor).and_then(|t| manifest.units.get(&t.unit));
        unit.is_some_and(|unit| {
            unit.components.values().all(|c| {
                let shard = done.find(&c.tensor).map(|(shard, _)| shard.path());
                shard.and_then(|path| path.file_name()).is_some_and(|name| name == file)
            })
        })
    };
    planned == manifest.tensors.len()
        && job.plan.shards.len() == manifest.shards.len()
        && job.plan.shards.iter().all(|shard| {
            shard.units.iter().flat_map(|u| &u.tensors).all(|tensor| in_file(tensor, &shard.file))
        })
}

fn damaged(error: &FormatError) -> String {
    format!("but it is damaged ({error})")
}

/// What in the output is not as its manifest says.
fn damage(root: &Path, manifest: &Manifest, done: &Directory, progress: &dyn Progress) -> Option<String> {
    let good = |name: &String, entry: &FileEntry| {
        let bytes = llmpress_formats::read_small_file(&root.join(name), MAX_FILE_BYTES);
        bytes.is_ok_and(|bytes| Digest::of(&bytes) == entry.blake3)
    };
    if let Some((name, _)) = manifest.files.iter().find(|(name, entry)| !good(name, entry)) {
        return Some(format!("but its {name} was changed or is missing"));
    }
    for shard in done.shards() {
        let name = shard.path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if !shard.entry().is_ok_and(|entry| manifest.shards.get(name) == Some(&entry)) {
            return Some(format!("but its {name} was changed"));
        }
    }
    let components: Vec<_> = manifest.units.values().flat_map(|u| u.components.values()).collect();
    if components.len() != done.names().count() {
        return Some("but its shards hold other tensors than its manifest says".to_owned());
    }
    let changed = components.par_iter().find_map_any(|entry| {
        let right = done.find(&entry.tensor).is_some_and(|(shard, info)| {
            let component = shard.component(info);
            let digest = digest(component.bytes(), |at, piece| component.read_at(at, piece), progress);
            digest.is_ok_and(|digest| digest == entry.blake3)
        });
        (!right).then_some(&entry.tensor)
    });
    changed.map(|tensor| format!("but its {tensor} was changed"))
}

/// A tensor of the source that is another one than the output was made from.
fn other_tensor(
    checkpoint: &Checkpoint,
    manifest: &Manifest,
    progress: &dyn Progress,
) -> Result<Option<String>> {
    let known = checkpoint.manifest().map(|m| &m.tensors);
    let tensors: Vec<_> = checkpoint.tensors().iter().collect();
    let other = tensors.par_iter().find_map_any(|(name, tensor)| {
        let digest = match known.and_then(|k| k.get(*name)).filter(|_| tensor.is_stored()) {
            Some(entry) => Ok(entry.blake3),
            None => digest(tensor.bytes, |at, piece| checkpoint.read(name, at, piece), progress),
        };
        match digest {
            Ok(digest) if manifest.tensors.get(*name).is_some_and(|t| t.blake3 == digest) => None,
            Ok(_) => Some(Ok(format!("made from another source (its {name} was another)"))),
            Err(e) => Some(Err(e.into())),
        }
    });
    other.transpose()
}

/// A tensor of the base that is another one than the output was made with.
fn other_base(checkpoint: &Checkpoint, manifest: &Manifest) -> Result<Option<String>> {
    let Some(base) = checkpoint.stored_by().and_then(|base| base.checkpoint()) else { return Ok(None) };
    let units: Vec<_> = manifest.units.iter().collect();
    let other = units.par_iter().find_map_any(|(name, unit)| {
        let Encoding::Delta(delta) = unit.encoding(base.root(), name).ok()? else { return None };
        let tensor = unit.tensors.first()?;
        let found = base.tensor(tensor).map(|found| found.bytes);
        let digest = found.and_then(|bytes| digest(bytes, |at, piece| base.read(tensor, at, piece), &Silent));
        match digest {
            Ok(digest) if digest == delta.base_blake3 => None,
            Ok(_) => Some(Ok(format!("made with another base (its {tensor} was another)"))),
            Err(e) => Some(Err(e.into())),
        }
    });
    other.transpose()
}

/// The digest of so many bytes.
pub(crate) fn digest(
    bytes: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> llmpress_formats::Result<()>,
    progress: &dyn Progress,
) -> llmpress_formats::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    // Words of 64 bits: aligned for every decoder.
    let mut buffer = vec![0u64; PIECE.min(bytes as usize).div_ceil(8)];
    let mut at = 0;
    while at < bytes {
        let take = (bytes - at).min(PIECE as u64) as usize;
        let piece = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut buffer)[..take];
        read(at, piece)?;
        hasher.update(piece);
        progress.advance(take as u64);
        at += take as u64;
    }
    Ok(hasher.finalize().into())
}
