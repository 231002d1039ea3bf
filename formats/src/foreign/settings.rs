//! `quantization_config`: what the tool says that it did.

use std::collections::BTreeMap;

use regex::Regex;
use serde::Deserialize;

use crate::{Config, Error, Result};

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
    targets: Vec<String>,
    pub(super) weights: Option<Args>,
    pub(super) input_activations: Option<Args>,
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
            group.targets.iter().any(|target| match target.strip_prefix("re:") {
                // Anchored at the start alone, as the package matches.
                Some(pattern) => Regex::new(&format!("^(?:{pattern})")).is_ok_and(|re| re.is_match(module)),
                None => target == module,
            })
        };
        let of_class = |group: &&Group| group.targets.iter().any(|target| target == "Linear");
        let mut groups = self.config_groups.values();
        groups.find(names).or_else(|| self.config_groups.values().find(of_class))
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
