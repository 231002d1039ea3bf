//! DFloat11's unit pattern, derived from the tensors of a checkpoint.
//!
//! ```text
//! model.layers.7.self_attn.q_proj.weight
//! '---- block ----' '---- path ----'       blocks with equal lists of paths share one pattern
//! ```
//!
//! The official tools want a regular expression and an ordered list of sub-modules per model, written
//! by hand. Here the blocks are found by their numbers, and the linears of a block are put in the
//! order that the published models use.

use std::collections::BTreeMap;

use regex::bytes::Regex;
use serde_json::Value;

use crate::{Error, Result};

/// Model types whose blocks are known; anything else goes by the generic rule, which takes every
/// linear of a repeated block.
pub const KNOWN_MODEL_TYPES: [&str; 24] = [
    "deepseek_v2",
    "deepseek_v3",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt_oss",
    "llama",
    "llama4",
    "llama4_text",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
];

/// Linears in the order of the published models. A path of a known model that ends in none of these
/// (a router, say) stays plain.
const ORDER: [&str; 14] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
    "shared_expert",
    "shared_experts",
];

/// Those of latent attention and of gated delta layers, after the others: of these model types.
const OF_MIXERS: [&str; 8] = [
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "in_proj_qkvz",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
];

/// What the names of model types with such parts begin with.
const WITH_MIXERS: [&str; 4] = ["deepseek_v2", "deepseek_v3", "qwen3_next", "qwen3_5"];

/// One DFloat11 unit: a module, and the sub-modules whose weights it joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitPattern {
    /// The module's dotted name.
    pub unit: String,
    /// Paths of its linears below it, in order; empty if the module itself is the linear.
    pub paths: Vec<String>,
}

impl UnitPattern {
    /// The names of the unit's weights.
    pub fn tensors(&self) -> Vec<String> {
        if self.paths.is_empty() {
            return vec![format!("{}.weight", self.unit)];
        }
        self.paths.iter().map(|path| format!("{}.{path}.weight", self.unit)).collect()
    }
}

/// What the derivation needs to know of a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Traits<'a> {
    /// `model_type` of the configuration.
    pub model_type: Option<&'a str>,
    /// Whether the output head shares the embedding's weights.
    pub tied: bool,
    /// Whether a tied embedding becomes a unit too. The official runtime cannot run such a
    /// checkpoint; llmpress can.
    pub tied_embedding: bool,
}

/// The units of a checkpoint. `linears` are the names of its BF16 matrices that end in `.weight`.
pub fn derive_units<'a>(traits: Traits<'_>, linears: impl IntoIterator<Item = &'a str>) -> Vec<UnitPattern> {
    let known = traits.model_type.is_some_and(|t| KNOWN_MODEL_TYPES.contains(&t));
    let mut blocks: BTreeMap<Vec<Natural>, Vec<String>> = BTreeMap::new();
    let mut units = Vec::new();
    for name in linears {
        let Some(module) = name.strip_suffix(".weight") else { continue };
        let parts: Vec<&str> = module.split('.').collect();
        if let Some(number) = parts.iter().position(|p| is_number(p)).filter(|&n| n + 1 < parts.len()) {
            let path = &parts[number + 1..];
            let mixers =
                traits.model_type.is_some_and(|t| WITH_MIXERS.iter().any(|with| t.starts_with(with)));
            let most = ORDER.len() + if mixers { OF_MIXERS.len() } else { 0 };
            if !known || rank(path) < most {
                blocks.entry(natural_key(&parts[..=number])).or_default().push(path.join("."));
            }
        } else if is_head_or_embedding(&parts, traits) {
            units.push(UnitPattern { unit: module.to_owned(), paths: Vec::new() });
        }
    }
    for (block, mut paths) in blocks {
        paths.sort_by_key(|path| order_key(path));
        let unit = block.iter().map(Natural::text).collect::<Vec<_>>().join(".");
        units.push(UnitPattern { unit, paths });
    }
    units.sort_by(|a, b| a.unit.cmp(&b.unit));
    units
}

/// The linears of each repeated block, of the names of a checkpoint's matrices: the weights that are multiplied with
/// activations, in the order of the published models; no routers, embeddings or head.
pub fn block_linears<'a>(
    model_type: Option<&str>,
    matrices: impl IntoIterator<Item = &'a str>,
) -> Vec<Vec<String>> {
    let traits = Traits { model_type, tied: true, tied_embedding: false };
    derive_units(traits, matrices).into_iter().map(|unit| unit.tensors()).collect()
}

fn is_head_or_embedding(parts: &[&str], traits: Traits<'_>) -> bool {
    match parts.last() {
        Some(&"lm_head") => !traits.tied,
        Some(&"embed_tokens") => !traits.tied || traits.tied_embedding,
        _ => false,
    }
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
}

fn rank(path: &[&str]) -> usize {
    let leaf = path.last().copied().unwrap_or_default();
    ORDER.iter().chain(&OF_MIXERS).position(|o| *o == leaf).unwrap_or(ORDER.len() + OF_MIXERS.len())
}

/// Attention first, then the MLP or the experts by number; within each, the order of the published
/// models.
fn order_key(path: &str) -> (usize, Vec<Natural>, usize, String) {
    let parts: Vec<&str> = path.split('.').collect();
    let leaf = rank(&parts);
    let attention = parts.first().is_some_and(|p| p.contains("attn") || p.contains("attention"));
    let owner = parts.split_last().map(|(_, owner)| natural_key(owner)).unwrap_or_default();
    (usize::from(!attention), owner, leaf, path.to_owned())
}

/// A part of a name that sorts by value where it is a number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Natural {
    Number(usize, String),
    Text(String),
}

impl Natural {
    fn text(&self) -> &str {
        match self {
            Self::Number(_, text) | Self::Text(text) => text,
        }
    }
}

fn natural_key(parts: &[&str]) -> Vec<Natural> {
    parts
        .iter()
        .map(|p| match is_number(p) {
            // Length first orders decimal numbers of any size.
            true => Natural::Number(p.len(), (*p).to_owned()),
            false => Natural::Text((*p).to_owned()),
        })
        .collect()
}

/// The `pattern_dict` that describes exactly these units, in the official form. `blocks` tells how
/// many numbered blocks each prefix has, so that `\d+` is used only where all of them are units with
/// the same paths.
pub fn pattern_dict(
    units: &[UnitPattern],
    block_counts: &BTreeMap<String, usize>,
) -> Vec<(String, Vec<String>)> {
    let mut groups: BTreeMap<(String, &[String]), Vec<Natural>> = BTreeMap::new();
    let mut dict = Vec::new();
    for unit in units {
        match unit.unit.rsplit_once('.') {
            Some((prefix, number)) if is_number(number) => {
                groups.entry((prefix.to_owned(), &unit.paths)).or_default().extend(natural_key(&[number]));
            }
            _ => dict.push((regex::escape(&unit.unit), unit.paths.clone())),
        }
    }
    let mut blocks: Vec<(String, Vec<String>)> = Vec::new();
    for ((prefix, paths), mut numbers) in groups {
        numbers.sort();
        let escaped = regex::escape(&prefix);
        let pattern = if block_counts.get(&prefix) == Some(&numbers.len()) {
            format!(r"{escaped}\.\d+")
        } else {
            let list: Vec<&str> = numbers.iter().map(Natural::text).collect();
            format!(r"{escaped}\.(?:{})", list.join("|"))
        };
        blocks.push((pattern, paths.to_vec()));
    }
    blocks.extend(dict);
    blocks
}

/// How many numbered modules there are below each prefix, over all tensor names.
pub fn block_counts<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut seen: BTreeMap<String, std::collections::BTreeSet<&str>> = BTreeMap::new();
    for name in names {
        let mut at = 0;
        for part in name.split('.') {
            if is_number(part) && at > 0 {
                seen.entry(name[..at - 1].to_owned()).or_default().insert(part);
            }
            at += part.len() + 1;
        }
    }
    seen.into_iter().map(|(prefix, numbers)| (prefix, numbers.len())).collect()
}

/// A `pattern_dict` as the official configuration or a pattern file holds it. Names of modules are those of Python's
/// attributes, so `\w`, `\d` and the like stand for ASCII, which keeps expressions small.
#[derive(Debug, Clone)]
pub struct PatternDict(Vec<(Regex, Vec<String>)>);

impl PatternDict {
    /// Most entries that are accepted, and most bytes of their expressions together.
    const MAX_ENTRIES: usize = 4096;
    const MAX_TEXT_BYTES: usize = 256 << 10;
    /// Most memory of all expressions when compiled, of one alone, and what one may always have.
    const MAX_COMPILED_BYTES: usize = 4 << 20;
    const MAX_EXPRESSION_BYTES: usize = 256 << 10;
    const MIN_EXPRESSION_BYTES: usize = 8 << 10;
    /// Most bytes of names times expressions that are matched.
    const MAX_WORK: u64 = 1 << 32;

    /// Reads the JSON object of a pattern file or of `dfloat11_config.pattern_dict`.
    pub fn parse(value: &Value) -> Result<Self> {
        let bad = |what: String| Error::Invalid(format!("pattern_dict: {what}"));
        let object = value.as_object().ok_or_else(|| {
            bad("must be an object of regular expressions and lists of sub-modules".to_owned())
        })?;
        if object.is_empty() || object.len() > Self::MAX_ENTRIES {
            return Err(bad(format!("has {} entries; 1 to {} are allowed", object.len(), Self::MAX_ENTRIES)));
        }
        let text: usize = object.keys().map(String::len).sum();
        if text > Self::MAX_TEXT_BYTES {
            return Err(bad(format!(
                "its expressions have {text} bytes together; {} are allowed",
                Self::MAX_TEXT_BYTES
            )));
        }
        let most = (Self::MAX_COMPILED_BYTES / object.len())
            .clamp(Self::MIN_EXPRESSION_BYTES, Self::MAX_EXPRESSION_BYTES);
        let mut entries = Vec::new();
        for (pattern, paths) in object {
            let regex = regex::bytes::RegexBuilder::new(&format!("^(?:{pattern})$"))
                .unicode(false)
                .size_limit(most)
                .dfa_size_limit(most)
                .build()
                .map_err(|e| bad(format!("{pattern:?}: {e}")))?;
            let paths = paths
                .as_array()
                .and_then(|list| {
                    list.iter().map(|p| p.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
                })
                .ok_or_else(|| bad(format!("{pattern:?} must map to a list of names")))?;
            entries.push((regex, paths));
        }
        Ok(Self(entries))
    }

    /// The sub-modules of the module called `name`, if a pattern matches all of its name.
    pub fn paths(&self, name: &str) -> Option<&[String]> {
        self.0.iter().find(|(regex, _)| regex.is_match(name.as_bytes())).map(|(_, paths)| paths.as_slice())
    }

    /// Refuses to match so many bytes of names that it would take minutes.
    pub(crate) fn check_work<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let bytes: u64 = names.into_iter().map(|name| name.len() as u64).sum();
        if bytes.saturating_mul(self.0.len() as u64) <= Self::MAX_WORK {
            return Ok(());
        }
        Err(Error::Limit(format!(
            "pattern_dict: its {} entries would be matched with {bytes} bytes of names: give fewer and broader ones",
            self.0.len()
        )))
    }

    /// The units that these patterns make of a checkpoint's tensors, and the patterns that match
    /// nothing.
    ///
    /// # Errors
    /// Too many names for so many patterns.
    pub fn units<'a>(
        &self,
        tensors: impl IntoIterator<Item = &'a str>,
    ) -> Result<(Vec<UnitPattern>, Vec<String>)> {
        let mut modules = std::collections::BTreeSet::new();
        for name in tensors {
            modules.extend(name.match_indices('.').map(|(at, _)| &name[..at]));
        }
        self.check_work(modules.iter().copied())?;
        let mut used = vec![false; self.0.len()];
        let mut units = Vec::new();
        for module in modules {
            if let Some(i) = self.0.iter().position(|(regex, _)| regex.is_match(module.as_bytes())) {
                used[i] = true;
                units.push(UnitPattern { unit: module.to_owned(), paths: self.0[i].1.clone() });
            }
        }
        let unused = self.0.iter().zip(used).filter(|(_, used)| !used).map(|((regex, _), _)| {
            regex.as_str().trim_start_matches("^(?:").trim_end_matches(")$").to_owned()
        });
        Ok((units, unused.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: Traits<'_> = Traits { model_type: Some("llama"), tied: false, tied_embedding: false };

    fn names(blocks: usize, paths: &[&str]) -> Vec<String> {
        let mut names = vec!["model.embed_tokens.weight".to_owned(), "lm_head.weight".to_owned()];
        for block in 0..blocks {
            names.extend(paths.iter().map(|p| format!("model.layers.{block}.{p}.weight")));
        }
        names.sort();
        names
    }

    fn dict(traits: Traits<'_>, names: &[String]) -> Vec<(String, Vec<String>)> {
        let units = derive_units(traits, names.iter().map(String::as_str));
        pattern_dict(&units, &block_counts(names.iter().map(String::as_str)))
    }

    #[test]
    fn llama_blocks_get_the_published_order() {
        let names = names(
            12,
            &[
                "mlp.down_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "self_attn.k_proj",
                "self_attn.o_proj",
                "self_attn.q_proj",
                "self_attn.v_proj",
            ],
        );
        let published = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ];
        let expected = vec![
            (r"model\.layers\.\d+".to_owned(), published.map(str::to_owned).to_vec()),
            ("lm_head".to_owned(), vec![]),
            (r"model\.embed_tokens".to_owned(), vec![]),
        ];
        assert_eq!(dict(LLAMA, &names), expected);
        let tied = dict(Traits { tied: true, ..LLAMA }, &names);
        assert_eq!(tied, expected[..1]);
        let both = dict(Traits { tied: true, tied_embedding: true, ..LLAMA }, &names);
        assert_eq!(both, [expected[0].clone(), expected[2].clone()]);
    }

    #[test]
    fn phi3_fused_linears_and_experts_by_number() {
        let phi = Traits { model_type: Some("phi3"), ..LLAMA };
        let fused = ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]
            .map(str::to_owned);
        let names_phi = names(2, &fused.each_ref().map(String::as_str));
        let order = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];
        assert_eq!(dict(phi, &names_phi)[0].1, order);

        let mut paths = vec!["self_attn.q_proj".to_owned(), "block_sparse_moe.gate".to_owned()];
        for expert in [0, 10, 2] {
            paths.extend(["w3", "w1", "w2"].map(|w| format!("block_sparse_moe.experts.{expert}.{w}")));
        }
        let mixtral = Traits { model_type: Some("mixtral"), ..LLAMA };
        let names = names(1, &paths.iter().map(String::as_str).collect::<Vec<_>>());
        let mut expected = vec!["self_attn.q_proj".to_owned()];
        for expert in [0, 2, 10] {
            expected.extend(["w1", "w2", "w3"].map(|w| format!("block_sparse_moe.experts.{expert}.{w}")));
        }
        assert_eq!(dict(mixtral, &names)[0].1, expected, "the router stays plain");
        let unknown = dict(Traits { model_type: Some("new"), ..mixtral }, &names);
        assert!(unknown[0].1.contains(&"block_sparse_moe.gate".to_owned()), "the generic rule takes all");
    }

    #[test]
    fn blocks_that_differ_get_patterns_of_their_own() {
        let mut names = names(11, &["self_attn.q_proj", "mlp.experts.0.up_proj"]);
        names.retain(|n| n != "model.layers.3.mlp.experts.0.up_proj.weight");
        names.push("model.layers.3.mlp.up_proj.weight".to_owned());
        let dict = dict(LLAMA, &names);
        let patterns: Vec<&str> = dict.iter().map(|(p, _)| p.as_str()).collect();
        assert!(patterns.contains(&r"model\.layers\.(?:3)"), "{patterns:?}");
        assert!(patterns.contains(&r"model\.layers\.(?:0|1|2|4|5|6|7|8|9|10)"), "{patterns:?}");
        let json: serde_json::Map<String, Value> =
            dict.iter().map(|(p, l)| (p.clone(), l.clone().into())).collect();
        let (units, unused) = PatternDict::parse(&Value::Object(json))
            .unwrap()
            .units(names.iter().map(String::as_str))
            .unwrap();
        assert_eq!(units, derive_units(LLAMA, names.iter().map(String::as_str)));
        assert!(unused.is_empty());
    }

    #[test]
    fn bad_patterns_are_named() {
        for (json, fragment) in [
            (r#"{"(": []}"#, "\"(\""),
            (r#"{"a": 3}"#, "list of names"),
            (r#"[]"#, "object"),
            (r#"{}"#, "0 entries"),
            (r#"{"a{1000}{1000}{1000}": []}"#, "size"),
        ] {
            let error = PatternDict::parse(&serde_json::from_str(json).unwrap()).unwrap_err().to_string();
            assert!(error.contains(fragment), "{error}");
        }
    }
}
