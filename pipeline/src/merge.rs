//! The last step: index, configuration, copied files, and the manifest that makes it complete.
//!
//! ```text
//! receipts --> model.safetensors.index.json, config.json, copies --> llmpress.json
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::{
    BaseEntry, CONFIG_FILE, Checkpoint, Config, Digest, Encoding, FORMAT_VERSION, FileEntry, INDEX_FILE,
    Manifest, QUANTISATION_KEYS, Source, TensorEntry, Transform, UnitEntry, UnitPattern, WEIGHTS_KEY,
    block_counts, dfloat11_config, pattern_dict, write_atomic, write_atomic_with, write_json,
};
use serde::{Serialize, Serializer};

use crate::fingerprint::check_unchanged;
use crate::job::Job;
use crate::output::Output;
use crate::receipt::Receipt;
use crate::{Error, Options, Plan, Result};

/// Writes everything but the shards. A plain checkpoint (a restored one) gets no manifest, but a hidden file of the same
/// content, so that a later run knows what this one made.
pub(crate) fn merge(
    job: Job<'_>,
    output: &Output,
    receipts: Vec<(String, Receipt)>,
    source: Source,
    options: &Options,
) -> Result<()> {
    let Job { checkpoint, plan, carried, .. } = job;
    let mut files = BTreeMap::new();
    if !plan.plain || plan.shards.len() > 1 {
        let entry = write_index(&output.root.join(INDEX_FILE), &receipts)?;
        files.insert(INDEX_FILE.to_owned(), entry);
    }
    let mut publish = |name: &str, bytes: &[u8]| -> Result<()> {
        write_atomic(&output.root.join(name), bytes)?;
        files.insert(name.to_owned(), FileEntry { bytes: bytes.len() as u64, blake3: Digest::of(bytes) });
        Ok(())
    };
    for (name, path) in &carried.files {
        if name != CONFIG_FILE && !options.extra_files.contains_key(name) {
            publish(name, &carried.read(checkpoint, name, path)?)?;
        }
    }
    for (name, bytes) in carried.made.iter().filter(|(name, _)| **name != CONFIG_FILE) {
        if !options.extra_files.contains_key(*name) {
            publish(name, bytes)?;
        }
    }
    for (name, bytes) in &options.extra_files {
        publish(name, bytes)?;
    }
    if let Some(text) = config(checkpoint, plan, &receipts)? {
        publish(CONFIG_FILE, text.as_bytes())?;
    }
    let (mut shards, mut units, mut tensors) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (file, receipt) in receipts {
        for (unit, entry) in &receipt.units {
            for name in &entry.tensors {
                let tensor = checkpoint.tensor(name)?;
                let blake3 = receipt.tensors.get(name).copied().ok_or_else(|| {
                    Error::Invalid(format!("receipt of {file}: tensor {name} has no digest"))
                })?;
                let entry = TensorEntry {
                    dtype: tensor.dtype,
                    shape: tensor.shape.clone(),
                    unit: unit.clone(),
                    blake3,
                };
                tensors.insert(name.clone(), entry);
            }
        }
        shards.insert(file, receipt.shard);
        units.extend(receipt.units);
    }
    let base = base(checkpoint, &units)?;
    let mut manifest = Manifest {
        format_version: format!("{}.{}", FORMAT_VERSION.0, FORMAT_VERSION.1),
        requires: Transform::requirements(checkpoint.transforms()),
        producer: options.producer.clone(),
        source,
        base,
        recipe: serde_json::to_value(&plan.recipe).map_err(|e| Error::Invalid(format!("recipe: {e}")))?,
        tensors,
        units,
        tied: checkpoint.tied().clone(),
        dropped: checkpoint.dropped().clone(),
        shards,
        files,
        transforms: transforms(checkpoint)?,
        manifest_blake3: Digest([0; 32]),
    };
    check_unchanged(checkpoint, plan)?;
    Ok(manifest.write(&output.root.join(job.last_file()))?)
}

/// The base, where any tensor is stored by it.
fn base(checkpoint: &Checkpoint, units: &BTreeMap<String, UnitEntry>) -> Result<Option<BaseEntry>> {
    let Some(base) = checkpoint.stored_by() else { return Ok(None) };
    let mut tensors = BTreeMap::new();
    for (name, unit) in units {
        if let Encoding::Delta(delta) = unit.encoding(checkpoint.root(), name)? {
            tensors.extend(unit.tensors.iter().map(|tensor| (tensor.as_str(), delta.base_blake3)));
        }
    }
    let entry =
        || BaseEntry::new(base.name().to_owned(), tensors.iter().map(|(name, digest)| (*name, *digest)));
    Ok((!tensors.is_empty()).then(entry))
}

/// Those of the checkpoint: what is stored anew is still turned and scaled.
fn transforms(checkpoint: &Checkpoint) -> Result<Vec<serde_json::Value>> {
    let value =
        |transform| serde_json::to_value(transform).map_err(|e| Error::Invalid(format!("transforms: {e}")));
    checkpoint.transforms().iter().map(value).collect()
}

/// Writes the index: stored tensors, sorted, and their files.
fn write_index(path: &Path, receipts: &[(String, Receipt)]) -> Result<FileEntry> {
    #[derive(Serialize)]
    struct Index<'a> {
        metadata: Metadata,
        weight_map: WeightMap<'a>,
    }
    #[derive(Serialize)]
    struct Metadata {
        total_size: u64,
    }
    let mut names: Vec<(&str, &str)> = Vec::new();
    for (file, receipt) in receipts {
        let components = receipt.units.values().flat_map(|unit| unit.components.values());
        names.extend(components.map(|c| (c.tensor.as_str(), file.as_str())));
    }
    names.sort_unstable();
    let total_size = receipts.iter().map(|(_, receipt)| receipt.stored_bytes).sum();
    let index = Index { metadata: Metadata { total_size }, weight_map: WeightMap(&names) };
    let mut entry = FileEntry { bytes: 0, blake3: Digest([0; 32]) };
    write_atomic_with(path, |file| {
        let written = write_json(file, path, 0, |mut out| {
            serde_json::to_writer_pretty(&mut out, &index)?;
            out.write_all(b"\n").map_err(serde_json::Error::io)
        })?;
        entry = FileEntry { bytes: written.bytes, blake3: written.digest };
        Ok(())
    })?;
    Ok(entry)
}

/// Sorted pairs, written as an object.
struct WeightMap<'a>(&'a [(&'a str, &'a str)]);

impl Serialize for WeightMap<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, file)| (name, file)))
    }
}

/// The source's configuration, with or without the key of the published format, and without names of weights.
fn config(checkpoint: &Checkpoint, plan: &Plan, receipts: &[(String, Receipt)]) -> Result<Option<String>> {
    let Some(config) = checkpoint.config() else { return Ok(None) };
    // The weights have the usual names now.
    let mut config = Config::parse(config.path(), config.without_member(WEIGHTS_KEY)?)?;
    if checkpoint.is_dequantised() {
        // What another tool would look for is no longer there.
        for key in QUANTISATION_KEYS {
            config = Config::parse(config.path(), config.without_member(key)?)?;
        }
    }
    if let Some(settings) = &plan.quantization_config {
        let key = QUANTISATION_KEYS[0];
        config = Config::parse(config.path(), config.with_member(key, settings)?)?;
    }
    let config = &config;
    let mut units = Vec::new();
    for (name, entry) in receipts.iter().flat_map(|(_, r)| &r.units) {
        if entry.encoding.value().get("name").and_then(|n| n.as_str()) != Some("dfloat11") {
            continue;
        }
        // The inverse of UnitPattern::tensors.
        let path = |tensor: &String| {
            Some(tensor.strip_prefix(name.as_str())?.strip_prefix('.')?.strip_suffix(".weight")?.to_owned())
        };
        let own = entry.tensors.len() == 1 && entry.tensors[0] == format!("{name}.weight");
        let paths = if own { Some(Vec::new()) } else { entry.tensors.iter().map(path).collect() };
        let paths =
            paths.ok_or_else(|| Error::Invalid(format!("unit {name}: its tensors are not below it")))?;
        units.push(UnitPattern { unit: name.clone(), paths });
    }
    let key = llmpress_formats::DFLOAT11_KEY;
    if units.is_empty() {
        return Ok(Some(config.without_member(key)?));
    }
    let counts = block_counts(checkpoint.tensors().keys().map(String::as_str));
    Ok(Some(config.with_member(key, &dfloat11_config(&pattern_dict(&units, &counts)))?))
}
