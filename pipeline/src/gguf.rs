//! A checkpoint as one GGUF file, for llama.cpp and what is built on it.
//!
//! ```text
//! config.json, tokenizer.json, chat template --> metadata     names.rs: which tensors     storage.rs: how each is stored
//! OUT/.llmpress/model-TYPE.gguf: written group by group (begun.rs), opened by its reader, compared --> OUT/model-TYPE.gguf
//! ```
//!
//! Numbers stay what they are. The dtypes that wider ones came from are noted (`llmpress.dtypes`), so that the reader gives back the bits.

mod begun;
mod family;
mod keys;
mod names;
mod storage;
mod tokenizer;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use llmpress_formats::encoding::ggml::Blocks;
use llmpress_formats::{
    Checkpoint, Digest, Error as FormatError, FORMAT_VERSION, FileEntry, GGUF_DTYPES_KEY, GgufLayout,
    GgufTensor, GgufValue, Manifest, STATE_DIR, Transform,
};
use llmpress_model::ModelConfig;
use serde_json::json;

use crate::budget::{Budget, Needs};
use crate::card::{Card, Measured};
use crate::carried::carried;
use crate::convert::pool;
use crate::export::counted;
use crate::fingerprint::{check_unchanged, with_settings};
use crate::job::Job;
use crate::output::{Output, Permissions, Prepared};
use crate::progress::Silent;
use crate::work::{Threads, Work};
use crate::{Error, ExportFormat, Options, Plan, Progress, Result, Summary};
use begun::Begun;
use family::Family;
use storage::Stored;

/// What the names of such files end in.
pub(crate) const EXTENSION: &str = ".gguf";
/// The version of the blocks of codes, as llama.cpp counts it.
const QUANTISATION_VERSION: u32 = 2;

/// A file that is going to be written.
struct Planned {
    stored: Vec<Stored>,
    layout: GgufLayout,
    /// Small tensors before all others.
    factors: Vec<Vec<f32>>,
    file: String,
    notes: Vec<(String, String)>,
}

/// Writes a checkpoint as a GGUF file. Every tensor is read again and compared before the file gets its name.
///
/// # Errors
/// What GGUF or llama.cpp cannot say of the model, by key, file or tensor, before any work; what [`crate::convert`] says.
pub(crate) fn export(
    checkpoint: &Checkpoint,
    out: &Path,
    measured: &[Measured],
    options: &Options,
    progress: &dyn Progress,
) -> Result<Summary> {
    let start = Instant::now();
    let mut options = options.clone();
    let planned = planned(checkpoint)?;
    let plan = plan(checkpoint, &planned)?;
    let budget = budget(checkpoint, &planned, &options)?;
    let carried = carried(checkpoint)?;
    carried.check(checkpoint)?;
    let card = Card {
        format: ExportFormat::Gguf,
        file: Some(&planned.file),
        stored: in_words(&planned.stored),
        bytes: planned.layout.bytes(),
        source_bytes: plan.source_bytes,
        measured,
    };
    card.put(checkpoint, &carried, &mut options.extra_files)?;
    let pool = pool(budget.jobs)?;
    let allow = Permissions { resume: options.resume, force: options.force };
    let job = Job { checkpoint, plan: &plan, carried: &carried, extra_files: &options.extra_files };
    let mut summary = Summary {
        source_bytes: plan.source_bytes,
        output_bytes: planned.layout.bytes(),
        shards: 1,
        resumed: 0,
        fallbacks: planned.notes.clone(),
        uncovered: None,
        left_behind: Vec::new(),
        removed: Vec::new(),
        budget,
        seconds: 0.0,
    };
    let mut output = match pool.install(|| Output::prepare(out, job, allow, progress))? {
        Prepared::Work(output) => output,
        Prepared::Complete(_) => {
            summary.resumed = 1;
            summary.seconds = start.elapsed().as_secs_f64();
            return Ok(summary);
        }
    };
    summary.removed = std::mem::take(&mut output.removed);
    progress.start(plan.source_bytes.saturating_mul(2));
    let entry = pool.install(|| written(checkpoint, &output, &planned, budget, progress))?;
    let mut files = BTreeMap::from([(planned.file.clone(), entry)]);
    for (name, bytes) in &options.extra_files {
        llmpress_formats::write_atomic(&output.root.join(name), bytes)?;
        files.insert(name.clone(), FileEntry { bytes: bytes.len() as u64, blake3: Digest::of(bytes) });
    }
    finish(job, &output, files, &options)?;
    output.complete()?;
    progress.shard(&planned.file);
    summary.seconds = start.elapsed().as_secs_f64();
    Ok(summary)
}

/// What the file will hold.
fn planned(checkpoint: &Checkpoint) -> Result<Planned> {
    let root = checkpoint.root();
    Transform::refuse_online(checkpoint.transforms(), root, "which GGUF cannot say: quantise without it")?;
    let config = checkpoint.config().ok_or_else(|| {
        Error::Invalid(format!("{}: has no config.json, of which the metadata are made", root.display()))
    })?;
    let config = ModelConfig::parse(config)?;
    let family = Family::of(checkpoint, &config)?;
    let said = keys::said(checkpoint, &config, family)?;
    let stored = storage::stored(checkpoint, names::placed(checkpoint, &config, family)?)?;
    let mut notes: Vec<(String, String)> =
        said.notes.into_iter().map(|note| (config.blueprint.name.to_owned(), note)).collect();
    notes.extend(storage::decoded(&stored));
    let rows = checkpoint.tensor("model.embed_tokens.weight")?.shape.first().copied().unwrap_or(0);
    let most = most(&stored);
    let text = |value: &str| GgufValue::Text(value.to_owned());
    let mut values = vec![
        ("general.architecture".to_owned(), text(family.architecture())),
        ("general.type".to_owned(), text("model")),
        ("general.name".to_owned(), text(&crate::source::name_of(checkpoint))),
        ("general.file_type".to_owned(), GgufValue::Number(file_type(most))),
    ];
    if stored.iter().any(|stored| stored.blocks.is_quantised()) {
        values.push(("general.quantization_version".to_owned(), GgufValue::Number(QUANTISATION_VERSION)));
    }
    values.extend(said.values);
    values.extend(tokenizer::keys(root, rows)?);
    let dtypes = stored.iter().filter(|stored| stored.dtype != stored.blocks.decoded());
    let dtypes: Vec<String> = dtypes.map(|s| format!("{} {}", s.placed.name, s.dtype.name())).collect();
    if !dtypes.is_empty() {
        values.push((GGUF_DTYPES_KEY.to_owned(), GgufValue::Texts(dtypes)));
    }
    let factors = said.factors.iter().map(|(name, factors)| GgufTensor {
        name: (*name).to_owned(),
        blocks: Blocks::F32,
        shape: vec![factors.len() as u64],
    });
    let matrices = stored.iter().map(|stored| GgufTensor {
        name: stored.placed.name.clone(),
        blocks: stored.blocks,
        shape: stored.whole(),
    });
    let layout = GgufLayout::new(&values, &factors.chain(matrices).collect::<Vec<_>>())?;
    let factors = said.factors.into_iter().map(|(_, factors)| factors).collect();
    let file = format!("model-{}{EXTENSION}", most.name().to_uppercase());
    Ok(Planned { stored, layout, factors, file, notes })
}

/// The types with how many tensors each has.
fn in_words(stored: &[Stored]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    stored.iter().for_each(|stored| *counts.entry(stored.blocks.name().to_uppercase()).or_default() += 1);
    counted(counts)
}

/// The type that most weights are stored in.
fn most(stored: &[Stored]) -> Blocks {
    let mut weights: BTreeMap<u32, (u64, Blocks)> = BTreeMap::new();
    for stored in stored.iter().filter(|stored| stored.shape.len() > 1) {
        weights.entry(stored.blocks.ggml()).or_insert((0, stored.blocks)).0 +=
            stored.whole().iter().product::<u64>();
    }
    weights.into_values().max_by_key(|(weights, _)| *weights).map_or(Blocks::F32, |(_, blocks)| blocks)
}

/// The number that llama.cpp has for a file of mostly this type.
fn file_type(blocks: Blocks) -> u32 {
    match blocks {
        Blocks::F16 => 1,
        Blocks::Q4_0 => 2,
        Blocks::Q4_1 => 3,
        Blocks::Q8_0 => 7,
        Blocks::Q5_0 => 8,
        Blocks::Q5_1 => 9,
        Blocks::Bf16 => 32,
        _ => 0,
    }
}

/// The plan as an output's folder keeps it: one file of all tensors.
fn plan(checkpoint: &Checkpoint, planned: &Planned) -> Result<Plan> {
    let mut plan = Plan::plain(checkpoint, u64::MAX)?;
    if let Some(shard) = plan.shards.first_mut() {
        shard.file = planned.file.clone();
    }
    let header = Digest::of(planned.layout.header()).to_string();
    plan.quantization_config = Some(json!({"format": "gguf", "header": header}));
    plan.fingerprint = with_settings(plan.fingerprint, plan.quantization_config.as_ref());
    plan.expected_bytes = planned.layout.bytes();
    Ok(plan)
}

fn budget(checkpoint: &Checkpoint, planned: &Planned, options: &Options) -> Result<Budget> {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let needs = Needs {
        indivisible: planned.stored.iter().map(write::indivisible).max().unwrap_or(0),
        handy: 0,
        largest_unit: 0,
        tensors: checkpoint.tensors().len() as u64,
        compressed_source: checkpoint.units().values().any(|unit| unit.encoding().name() != "raw"),
    };
    Budget::new(needs, options.jobs.unwrap_or(available).max(1), options.max_memory)
}

/// Writes the file under its hidden name, or what is left of it, compares, and gives it its own.
fn written(
    checkpoint: &Checkpoint,
    output: &Output,
    planned: &Planned,
    budget: Budget,
    progress: &dyn Progress,
) -> Result<FileEntry> {
    let path = output.root.join(STATE_DIR).join(&planned.file);
    let mut begun = Begun::open(&path, &output.root.join(&planned.file), &planned.layout)?;
    output.check_space(planned.layout.bytes() - begun.held())?;
    for (number, factors) in planned.factors.iter().enumerate() {
        let bytes: Vec<u8> = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
        let offset = planned.layout.offset(number).unwrap_or(0);
        begun.file.write_all_at(&bytes, offset).map_err(|e| FormatError::io(&path, "write", e))?;
    }
    let work =
        Work { piece_bytes: budget.piece_bytes, batch: budget.jobs * 2, threads: Threads::Pool, progress };
    write::tensors(checkpoint, &planned.stored, &planned.layout, planned.factors.len(), &mut begun, work)?;
    let read = Checkpoint::open(&path)?;
    write::compare(checkpoint, &planned.stored, &read, work)?;
    tokenizer::compare(checkpoint.root(), &path)?;
    let blake3 = begun.digest(0..planned.layout.bytes())?;
    begun.file.sync_all().map_err(|e| FormatError::io(&path, "sync", e))?;
    let io = |what: &'static str| move |e| FormatError::io(&output.root, what, e);
    std::fs::rename(&path, output.root.join(&planned.file)).map_err(io("rename within"))?;
    File::open(&output.root).and_then(|dir| dir.sync_all()).map_err(io("sync"))?;
    Ok(FileEntry { bytes: planned.layout.bytes(), blake3 })
}

/// Says that the output is complete.
fn finish(
    job: Job<'_>,
    output: &Output,
    files: BTreeMap<String, FileEntry>,
    options: &Options,
) -> Result<()> {
    let recipe =
        serde_json::to_value(&job.plan.recipe).map_err(|e| Error::Invalid(format!("recipe: {e}")))?;
    let mut manifest = Manifest {
        format_version: format!("{}.{}", FORMAT_VERSION.0, FORMAT_VERSION.1),
        requires: Vec::new(),
        producer: options.producer.clone(),
        source: crate::source::describe(job.checkpoint, job.carried)?,
        base: None,
        recipe,
        tensors: BTreeMap::new(),
        units: BTreeMap::new(),
        tied: BTreeMap::new(),
        dropped: BTreeMap::new(),
        shards: BTreeMap::new(),
        files,
        transforms: Vec::new(),
        manifest_blake3: Digest([0; 32]),
    };
    check_unchanged(job.checkpoint, job.plan)?;
    Ok(manifest.write(&output.root.join(job.last_file()))?)
}

/// How a file that is there differs from what the job would make, as the end of a sentence; `None` if it does not.
pub(crate) fn difference(
    root: &Path,
    manifest: &Manifest,
    job: Job<'_>,
    file: &str,
) -> Result<Option<String>> {
    let Some(entry) = manifest.files.get(file).filter(|_| manifest.shards.is_empty()) else {
        return Ok(Some("of another kind".to_owned()));
    };
    let path = root.join(file);
    let read = || -> std::io::Result<File> { File::open(&path) };
    let same = read().is_ok_and(|file| {
        let len = file.metadata().is_ok_and(|meta| meta.len() == entry.bytes);
        let piece = |at: u64, out: &mut [u8]| {
            file.read_exact_at(out, at).map_err(|e| FormatError::io(&path, "read", e))
        };
        len && crate::complete::digest(entry.bytes, piece, &Silent).is_ok_and(|found| found == entry.blake3)
    });
    if !same {
        return Ok(Some(format!("but its {file} was changed or is missing")));
    }
    let planned = planned(job.checkpoint)?;
    let work = Work { piece_bytes: 1 << 20, batch: 1, threads: Threads::Pool, progress: &Silent };
    match write::compare(job.checkpoint, &planned.stored, &Checkpoint::open(&path)?, work) {
        Err(Error::Mismatch { unit, .. }) => {
            Ok(Some(format!("made from another source (its {unit} was another)")))
        }
        other => other.map(|()| None),
    }
}
