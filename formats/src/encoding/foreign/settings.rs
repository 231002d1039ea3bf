//! `quantization_config`: what the tool says that it did.

use std::collections::BTreeMap;

use regex::{Regex, RegexBuilder};
use serde::Deserialize;

use crate::{Config, Error, Result};

/// Most bytes of a compiled pattern.
const PATTERN_BYTES: usize = 1 << 20;

/// The settings of a tool whose checkpoints are read.
#[derive(Debug)]
pub(super) enum Settings {
    CompressedTensors(CompressedTensors),
    Gptq(Gptq),
    Awq(Awq),
}

impl Settings {
    /// Those of a checkpoint; `None` where none is quantised.
    pub(super) fn of(config: &Config) -> Result<Option<Self>> {
        let Some(method) = config.quantised_by() else { return Ok(None) };
        let Some(value) = config.quantisation() else { return Ok(None) };
        let wrong = |e| Error::corrupt(config.path(), None, format!("quantization_config: {e}"));
        Ok(Some(match method {
            "compressed-tensors" => {
                Self::CompressedTensors(CompressedTensors::deserialize(value).map_err(wrong)?)
            }
            "gptq" | "gptqmodel" => Self::Gptq(Gptq::deserialize(value).map_err(wrong)?),
            "awq" => Self::Awq(Awq::deserialize(value).map_err(wrong)?),
            // Others are as they are stored.
            _ => return Ok(None),
        }))
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct CompressedTensors {
    #[serde(default)]
    config_groups: BTreeMap<String, Group>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Group {
    #[serde(default)]
    targets: Vec<Target>,
    pub(super) weights: Option<Args>,
    pub(super) input_activations: Option<Args>,
}

/// What a group is for: a module or a class by name, or modules by a pattern.
#[derive(Debug)]
enum Target {
    Name(String),
    Pattern(Regex),
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let Some(pattern) = text.strip_prefix("re:") else { return Ok(Self::Name(text)) };
        // Anchored at the start alone, as the package matches; compiled once, whatever the number of modules.
        let pattern = RegexBuilder::new(&format!("^(?:{pattern})")).size_limit(PATTERN_BYTES).build();
        pattern.map(Self::Pattern).map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Args {
    pub(super) num_bits: u8,
    #[serde(rename = "type", default = "int")]
    pub(super) kind: String,
    #[serde(default = "yes")]
    pub(super) symmetric: bool,
    #[serde(default)]
    pub(super) group_size: Option<i64>,
    #[serde(default)]
    pub(super) strategy: Option<String>,
    #[serde(default)]
    block_structure: serde_json::Value,
    #[serde(default)]
    pub(super) dynamic: serde_json::Value,
}

fn int() -> String {
    "int".to_owned()
}

fn yes() -> bool {
    true
}

impl CompressedTensors {
    /// The group that a module belongs to: one that names it, else one that names its class.
    pub(super) fn group(&self, module: &str) -> Option<&Group> {
        let names = |group: &&Group| {
            group.targets.iter().any(|target| match target {
                Target::Pattern(pattern) => pattern.is_match(module),
                Target::Name(name) => name == module,
            })
        };
        let linear = |target: &Target| matches!(target, Target::Name(name) if name == "Linear");
        let of_class = |group: &&Group| group.targets.iter().any(linear);
        let mut groups = self.config_groups.values();
        groups.find(names).or_else(|| self.config_groups.values().find(of_class))
    }
}

/// The groups of compressed-tensors, for whoever reads what is no integer.
#[derive(Debug)]
pub(crate) struct Groups(CompressedTensors);

/// A group of floats.
#[derive(Debug)]
pub(crate) struct FloatGroup {
    /// Bits of a float.
    pub(crate) bits: u8,
    /// Rows and columns that share a scale, where they are said.
    pub(crate) block: Option<[u64; 2]>,
}

impl Groups {
    /// Those of a checkpoint that compressed-tensors quantised; `None` of others.
    ///
    /// # Errors
    /// Settings that are not read.
    pub(crate) fn of(config: &Config) -> Result<Option<Self>> {
        Ok(match Settings::of(config)? {
            Some(Settings::CompressedTensors(settings)) => Some(Self(settings)),
            _ => None,
        })
    }

    /// What is said of a module whose weights are floats.
    pub(crate) fn float(&self, module: &str) -> Option<FloatGroup> {
        let args = self.0.group(module)?.weights.as_ref().filter(|args| args.is_float())?;
        let block = match (&args.block_structure, args.group_size) {
            (serde_json::Value::Array(sides), _) => match &sides[..] {
                [rows, cols] => rows.as_u64().zip(cols.as_u64()).map(|(rows, cols)| [rows, cols]),
                _ => None,
            },
            (_, Some(size)) => u64::try_from(size).ok().map(|size| [1, size]),
            _ => None,
        };
        Some(FloatGroup { bits: args.num_bits, block: block.filter(|block| !block.contains(&0)) })
    }
}

impl Args {
    /// Whether weights are floats.
    pub(super) fn is_float(&self) -> bool {
        self.kind == "float"
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Gptq {
    pub(super) bits: u8,
    #[serde(default = "per_row")]
    pub(super) group_size: i64,
    #[serde(default)]
    pub(super) checkpoint_format: Option<String>,
    /// What GPTQModel calls the same.
    #[serde(default)]
    pub(super) format: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Awq {
    #[serde(alias = "w_bit")]
    pub(super) bits: u8,
    #[serde(default = "per_row", alias = "q_group_size")]
    pub(super) group_size: i64,
    #[serde(default)]
    pub(super) version: Option<String>,
    #[serde(default = "yes")]
    pub(super) zero_point: bool,
}

fn per_row() -> i64 {
    -1
}

/// Columns of a group as these tools write it: -1, or nothing, for a whole row.
pub(super) fn group_size(config: &Config, size: Option<i64>) -> Result<Option<u32>> {
    match size {
        None | Some(-1) => Ok(None),
        Some(size) => match u32::try_from(size) {
            Ok(size) if size > 0 => Ok(Some(size)),
            _ => Err(Error::corrupt(
                config.path(),
                None,
                format!("quantization_config: group_size {size} is no number of columns"),
            )),
        },
    }
}
