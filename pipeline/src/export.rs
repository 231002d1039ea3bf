//! Checkpoints for other runtimes: quantised matrices in their layouts, everything else plain, and a configuration that
//! says so.
//!
//! ```text
//! abq units --layout--> weight_packed, weight_scale, ...    other units --> raw
//! widths of all of them --> quantization_config
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::str::FromStr;

use llmpress_formats::encoding::Encoding;
use llmpress_formats::encoding::abq::ZERO;
use llmpress_formats::foreign::{Foreign, Layout};
use llmpress_formats::{Checkpoint, Transform};
use llmpress_model::undone;
use serde_json::{Value, json};

use crate::card::{Card, Measured};
use crate::carried::carried;
use crate::convert::{convert, name_only_shard};
use crate::fingerprint::with_settings;
use crate::method::Target;
use crate::{Error, Method, Options, Plan, Progress, Result, Summary};

/// A format that other runtimes read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportFormat {
    /// compressed-tensors, for vLLM, SGLang and transformers.
    CompressedTensors,
    /// GPTQ, for vLLM, SGLang, transformers and exllama.
    Gptq,
    /// One GGUF file, for llama.cpp and what is built on it.
    Gguf,
    /// Plain numbers, for everything that loads a checkpoint of transformers.
    Safetensors,
}

impl ExportFormat {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::CompressedTensors, Self::Gptq, Self::Gguf, Self::Safetensors];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::Gptq => "gptq",
            Self::Gguf => "gguf",
            Self::Safetensors => "safetensors",
        }
    }

    /// The name for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::Gptq => "GPTQ",
            Self::Gguf => "GGUF",
            Self::Safetensors => "Plain weights",
        }
    }

    /// Opens a checkpoint as it is exported: quantised matrices as they are stored where the format has them, else as numbers, with
    /// what was folded into them undone where everything is written plain.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`]; what cannot be undone.
    pub fn open(self, dir: &Path) -> Result<Checkpoint> {
        Ok(match self {
            Self::CompressedTensors | Self::Gptq => Checkpoint::open(dir)?,
            Self::Gguf => Checkpoint::open_dequantised(dir)?,
            Self::Safetensors => undone(Checkpoint::open_dequantised(dir)?)?,
        })
    }
}

impl FromStr for ExportFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::Invalid(format!("unknown format {text:?}; there are {names}"))
        })
    }
}

/// Writes a checkpoint that other runtimes read. Every number is the same: each matrix is decoded from its new layout and
/// compared before its shard gets its name. A model card (README.md) says what was done, and what was `measured`.
///
/// # Errors
/// A matrix that the format cannot say, by name, before any work; what [`convert`] says.
pub fn export(
    checkpoint: &Checkpoint,
    out: &Path,
    format: ExportFormat,
    max_shard_bytes: u64,
    measured: &[Measured],
    options: &Options,
    progress: &dyn Progress,
) -> Result<Summary> {
    let mut plan = match format {
        ExportFormat::CompressedTensors => plan(checkpoint, Layouts::CompressedTensors, max_shard_bytes)?,
        ExportFormat::Gptq => plan(checkpoint, Layouts::Gptq, max_shard_bytes)?,
        ExportFormat::Gguf => return crate::gguf::export(checkpoint, out, measured, options, progress),
        ExportFormat::Safetensors => Plan::plain(checkpoint, max_shard_bytes)?,
    };
    name_only_shard(&mut plan);
    let mut options = options.clone();
    let card = Card {
        format,
        file: None,
        stored: in_words(checkpoint, format),
        bytes: plan.expected_bytes,
        source_bytes: plan.source_bytes,
        measured,
    };
    card.put(checkpoint, &carried(checkpoint)?, &mut options.extra_files)?;
    convert(checkpoint, out, &plan, &options, progress)
}

/// How the weights of an export are stored, with how many tensors of each kind.
fn in_words(checkpoint: &Checkpoint, format: ExportFormat) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in checkpoint.tensors().values() {
        let abq = checkpoint.unit_of(tensor).ok().and_then(|unit| match unit.encoding() {
            Encoding::Abq(abq) if format != ExportFormat::Safetensors => Some(abq.widths()),
            _ => None,
        });
        *counts.entry(abq.unwrap_or_else(|| tensor.dtype.name().to_owned())).or_default() += 1;
    }
    counted(counts)
}

/// Names with their numbers, the most frequent first.
pub(crate) fn counted(counts: BTreeMap<String, usize>) -> String {
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let each = counts
        .into_iter()
        .map(|(name, count)| format!("{name} ({count} tensor{})", if count == 1 { "" } else { "s" }));
    each.collect::<Vec<_>>().join(", ")
}

/// A format whose matrices are codes in a layout of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layouts {
    CompressedTensors,
    Gptq,
}

impl Layouts {
    fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => ExportFormat::CompressedTensors.name(),
            Self::Gptq => ExportFormat::Gptq.name(),
        }
    }
}

fn plan(checkpoint: &Checkpoint, format: Layouts, max_shard_bytes: u64) -> Result<Plan> {
    let root = checkpoint.root();
    let what = format!("which {} cannot say: quantise without it", format.name());
    Transform::refuse_online(checkpoint.transforms(), root, &what)?;
    let mut plan = Plan::plain(checkpoint, max_shard_bytes)?;
    let layout = match format {
        Layouts::Gptq => Layout::Gptq { plain_zeros: false },
        Layouts::CompressedTensors if all_of_eight(checkpoint) => Layout::IntQuantized,
        Layouts::CompressedTensors => Layout::PackQuantized,
    };
    let method = match layout {
        Layout::Gptq { .. } => Method::Gptq,
        Layout::IntQuantized => Method::IntQuantized,
        _ => Method::PackQuantized,
    };
    let mut quantised: BTreeMap<String, Foreign> = BTreeMap::new();
    let mut dense: BTreeSet<String> = BTreeSet::new();
    let mut symmetric = true;
    for unit in plan.shards.iter_mut().flat_map(|shard| &mut shard.units) {
        let tensor = checkpoint.tensor(&unit.name)?;
        let module = unit.name.strip_suffix(".weight");
        let stored = checkpoint.unit_of(tensor)?;
        if !matches!(stored.encoding(), Encoding::Abq(_)) {
            // What else could be taken for a linear of the format's.
            if let Some(module) = module.filter(|m| tensor.shape.len() == 2 && !m.ends_with("embed_tokens")) {
                dense.insert(module.to_owned());
            }
            continue;
        }
        let refuse = |why: String| Error::Invalid(format!("{}: tensor {}: {why}", root.display(), unit.name));
        let module = module.ok_or_else(|| refuse("is no weight of a module".to_owned()))?;
        let target = Target::new(layout, stored, tensor).map_err(refuse)?;
        (unit.method, unit.expected_bytes) = (method, target.bytes());
        symmetric &= !stored.components().contains_key(ZERO);
        quantised.insert(module.to_owned(), target.foreign);
    }
    if quantised.is_empty() {
        return Err(Error::Invalid(format!(
            "{}: holds nothing that is quantised: `restore` makes a plain checkpoint, `convert --to gptq:w4,g128` a \
             quantised one",
            root.display()
        )));
    }
    dense.insert("lm_head".to_owned());
    let config = match format {
        Layouts::CompressedTensors => compressed_tensors(&quantised, &dense, layout),
        Layouts::Gptq => gptq(&quantised, &dense, symmetric)
            .map_err(|why| Error::Invalid(format!("{}: {why}", root.display())))?,
    };
    plan.expected_bytes = plan.units().map(|unit| unit.expected_bytes).sum();
    plan.fingerprint = with_settings(plan.fingerprint, Some(&config));
    plan.quantization_config = Some(config);
    Ok(plan)
}

/// Whether every matrix has codes and inputs of eight bits and one scale a row: signed bytes then.
fn all_of_eight(checkpoint: &Checkpoint) -> bool {
    let mut widths = checkpoint.units().values().filter_map(|unit| match unit.encoding() {
        Encoding::Abq(abq) => Some(abq),
        _ => None,
    });
    widths.all(|abq| abq.bits == 8 && abq.activation_bits == Some(8) && abq.group_size.is_none())
}

/// What a group of `config_groups` has in common.
type Widths = (u8, Option<u32>, bool, Option<u8>);

fn compressed_tensors(
    quantised: &BTreeMap<String, Foreign>,
    dense: &BTreeSet<String>,
    layout: Layout,
) -> Value {
    let mut groups: BTreeMap<Widths, Vec<&String>> = BTreeMap::new();
    for (module, foreign) in quantised {
        let widths = (foreign.bits, foreign.group_size, foreign.zeros, foreign.activation_bits);
        groups.entry(widths).or_default().push(module);
    }
    // The most common widths are those of the class, the others are named.
    let most = groups.iter().max_by_key(|(_, modules)| modules.len()).map(|(widths, _)| *widths);
    let groups: serde_json::Map<String, Value> = groups
        .into_iter()
        .enumerate()
        .map(|(number, (widths, modules))| {
            let (bits, group_size, zeros, activation_bits) = widths;
            let targets = if Some(widths) == most { json!(["Linear"]) } else { json!(modules) };
            let strategy = if group_size.is_some() { "group" } else { "channel" };
            let inputs = activation_bits.map(|bits| {
                json!({"num_bits": bits, "type": "int", "symmetric": false, "strategy": "token", "dynamic": true})
            });
            let weights = json!({
                "num_bits": bits, "type": "int", "symmetric": !zeros, "group_size": group_size, "strategy": strategy,
                "dynamic": false, "actorder": null,
            });
            let group = json!({"targets": targets, "weights": weights, "input_activations": inputs, "output_activations": null});
            (format!("group_{number}"), group)
        })
        .collect();
    let format = if layout == Layout::IntQuantized { "int-quantized" } else { "pack-quantized" };
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
    })
}

/// GPTQ says one width and one size of groups for all linears but the head.
fn gptq(
    quantised: &BTreeMap<String, Foreign>,
    dense: &BTreeSet<String>,
    symmetric: bool,
) -> Result<Value, String> {
    let mut all = quantised.iter();
    let Some((first, foreign)) = all.next() else { return Err("holds nothing quantised".to_owned()) };
    let widths = |foreign: &Foreign| (foreign.bits, foreign.group_size);
    if let Some((other, _)) = all.find(|(_, other)| widths(other) != widths(foreign)) {
        return Err(format!(
            "{first} and {other} differ in width or groups, and GPTQ says one for all: export as compressed-tensors"
        ));
    }
    let head = quantised.contains_key("lm_head");
    if let Some(module) = dense.iter().find(|module| *module != "lm_head") {
        return Err(format!(
            "{module} is not quantised, and GPTQ takes every linear as quantised: export as compressed-tensors"
        ));
    }
    Ok(json!({
        "quant_method": "gptq",
        "bits": foreign.bits,
        "group_size": foreign.group_size.map_or(-1, i64::from),
        "desc_act": false,
        // Where this says so, runtimes do not look at the zero points.
        "sym": symmetric,
        "lm_head": head,
        "checkpoint_format": "gptq",
    }))
}
