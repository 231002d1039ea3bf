//! Official DFloat11 checkpoints, which have no manifest.
//!
//! ```text
//! config.json: dfloat11_config.pattern_dict      module name -> ordered sub-modules
//! *.safetensors: <unit>.{luts, encoded_exponent, sign_mantissa, output_positions, gaps, split_positions}
//! ```
//!
//! The files hold no shapes: they follow from the element counts in `split_positions` and from
//! `hidden_size`, which is one side of every linear of a decoder block. Other towers of a model have sizes of their own;
//! where those do not tell a shape, the directory is refused.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::architecture::PatternDict;
use crate::config::DFLOAT11_KEY;
use crate::encoding::{Part, dfloat11};
use crate::{Component, Config, Dtype, Error, Result};

/// The version of the published package whose files are written.
pub const PACKAGE_VERSION: &str = "0.5.0";

/// `dfloat11_config` for these patterns.
pub fn dfloat11_config(pattern_dict: &[(String, Vec<String>)]) -> Value {
    let patterns: serde_json::Map<String, Value> =
        pattern_dict.iter().map(|(pattern, paths)| (pattern.clone(), json!(paths))).collect();
    json!({
        "version": PACKAGE_VERSION,
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": patterns,
    })
}

/// A unit of an official checkpoint.
pub(crate) struct OfficialUnit {
    pub(crate) name: String,
    pub(crate) parts: Vec<Part>,
    pub(crate) components: BTreeMap<String, Component>,
}

/// The units among the stored tensors, which are taken out of `stored`.
pub(crate) fn take_units(
    config: &Config,
    stored: &mut BTreeMap<String, Component>,
) -> Result<Vec<OfficialUnit>> {
    let path = config.path();
    let Some(settings) = config.get(DFLOAT11_KEY) else { return Ok(Vec::new()) };
    let setting = |key: &str| settings.get(key).ok_or_else(|| missing(config, key));
    if setting("threads_per_block")? != &json!([512]) || setting("bytes_per_thread")? != &json!(8) {
        return Err(Error::unsupported(
            path,
            None,
            format!(
                "{DFLOAT11_KEY}: threads_per_block {} and bytes_per_thread {} are not the published [512] and 8",
                setting("threads_per_block")?,
                setting("bytes_per_thread")?
            ),
        ));
    }
    let patterns = PatternDict::parse(setting("pattern_dict")?)
        .map_err(|e| Error::corrupt(path, None, format!("{DFLOAT11_KEY}: {e}")))?;
    let suffix = format!(".{}", dfloat11::ENCODED_EXPONENT);
    let names: Vec<String> =
        stored.keys().filter_map(|name| name.strip_suffix(&suffix).map(str::to_owned)).collect();
    patterns.check_work(names.iter().map(String::as_str))?;
    let mut units = Vec::with_capacity(names.len());
    for name in names {
        let mut components = BTreeMap::new();
        for component in dfloat11::COMPONENTS {
            let full = format!("{name}.{component}");
            let found = stored.remove(&full).ok_or_else(|| {
                Error::corrupt(path, Some(&full), "is missing: the directory is incomplete, copy it again")
            })?;
            components.insert(component.to_owned(), found);
        }
        let parts = parts(config, &patterns, &name, &components)?;
        units.push(OfficialUnit { name, parts, components });
    }
    Ok(units)
}

fn missing(config: &Config, key: &str) -> Error {
    Error::corrupt(config.path(), None, format!("{DFLOAT11_KEY}.{key} is missing"))
}

fn parts(
    config: &Config,
    patterns: &PatternDict,
    unit: &str,
    components: &BTreeMap<String, Component>,
) -> Result<Vec<Part>> {
    let corrupt = |what: String| Error::corrupt(config.path(), Some(unit), what);
    let paths = patterns
        .paths(unit)
        .ok_or_else(|| corrupt(format!("no pattern of {DFLOAT11_KEY}.pattern_dict matches this unit")))?;
    let elements = components.get(dfloat11::SIGN_MANTISSA).map_or(0, Component::bytes);
    let splits = match components.get(dfloat11::SPLIT_POSITIONS) {
        Some(component) => dfloat11::read_split_positions(component, elements)?,
        None => Vec::new(),
    };
    // A module that is itself the linear has no splits, whatever its list says.
    let modules: Vec<String> = match (paths, splits.len()) {
        ([], 0) => vec![unit.to_owned()],
        (paths, n) if paths.len() == n + 1 => paths.iter().map(|p| format!("{unit}.{p}")).collect(),
        (paths, n) => {
            return Err(corrupt(format!(
                "its pattern lists {} sub-modules where split_positions gives {} tensors",
                paths.len(),
                n + 1
            )));
        }
    };
    let mut start = 0;
    let ends = splits.iter().copied().chain([elements]);
    modules
        .into_iter()
        .zip(ends)
        .map(|(module, end)| {
            let count = end - start;
            start = end;
            let name = format!("{module}.weight");
            let shape = shape(config, &module, count).ok_or_else(|| {
                Error::unsupported(
                    config.path(),
                    Some(&name),
                    format!(
                        "the shape of its {count} elements is not stored and does not follow from config.json: use a directory with llmpress.json, or the original checkpoint"
                    ),
                )
            })?;
            Ok(Part { name, dtype: Dtype::BF16, shape, bytes: count * 2 })
        })
        .collect()
}

/// The shape of a linear or embedding with `count` weights, by the name of its module.
fn shape(config: &Config, module: &str, count: u64) -> Option<Vec<u64>> {
    let leaf = module.rsplit('.').next()?;
    if !is_of_decoder(module) && (is_of_vision(module) || config.has_towers()) {
        return vision_shape(config, module, count);
    }
    let hidden = config.hidden_size()?;
    let other = count.is_multiple_of(hidden).then_some(count / hidden)?;
    match leaf {
        "q_proj" | "k_proj" | "v_proj" | "qkv_proj" | "gate_proj" | "up_proj" | "gate_up_proj" | "w1"
        | "w3" | "gate" | "lm_head" | "embed_tokens" => Some(vec![other, hidden]),
        "o_proj" | "down_proj" | "w2" => Some(vec![hidden, other]),
        _ => None,
    }
}

/// Whether a module is the head, the embedding or in a block of the decoder that the configuration describes.
fn is_of_decoder(module: &str) -> bool {
    let inside = ["language_model.model.", "model.language_model.", "language_model.", "model.", ""];
    inside.iter().filter_map(|prefix| module.strip_prefix(prefix)).any(|rest| {
        matches!(rest, "lm_head" | "embed_tokens")
            || rest
                .strip_prefix("layers.")
                .and_then(|r| r.split_once('.'))
                .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    })
}

fn is_of_vision(module: &str) -> bool {
    module.split('.').any(|part| part.contains("vision") || part == "visual")
}

/// The linears of a vision tower whose sides the configuration names: query, key and value are square, and an MLP
/// has its inner size on one side.
fn vision_shape(config: &Config, module: &str, count: u64) -> Option<Vec<u64>> {
    if !is_of_vision(module) {
        return None;
    }
    let size = |key: &str| config.get("vision_config")?.get(key)?.as_u64().filter(|&n| n > 0);
    let hidden = size("hidden_size")?;
    let shape = match module.rsplit('.').next()? {
        "q_proj" | "k_proj" | "v_proj" | "o_proj" | "out_proj" => vec![hidden, hidden],
        "fc1" | "gate_proj" | "up_proj" => vec![size("intermediate_size")?, hidden],
        "fc2" | "down_proj" => vec![hidden, size("intermediate_size")?],
        _ => return None,
    };
    (shape.iter().try_fold(1u64, |a, &b| a.checked_mul(b)) == Some(count)).then_some(shape)
}
