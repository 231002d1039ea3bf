//! Sub-layers that are removed from a decoder: which tensors that concerns, and what the configuration says then.
//!
//! ```text
//! attention of a layer:  self_attn.*, its norm            MLP of a layer:  mlp.*, its norm
//! some of them:          drop_attn_list, drop_mlp_list    whole layers:    the others are renumbered
//! portable:              o_proj and down_proj are zero and everything stays
//! ```

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::blueprint::{Experts, Turned, Windows};
use crate::{Blueprint, Checkpoint, Config, Edit, Error, Result};

/// The key under which LLM-Drop lists layers without attention.
pub const DROP_ATTENTION_KEY: &str = "drop_attn_list";
/// The key under which LLM-Drop lists layers without MLP.
pub const DROP_MLP_KEY: &str = "drop_mlp_list";

/// Sub-layers to remove, by the numbers that layers have before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Removal {
    /// Layers whose attention goes.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub attention: BTreeSet<usize>,
    /// Layers whose MLP goes.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub mlp: BTreeSet<usize>,
    /// Keep every tensor and make the last product of each sub-layer zero instead.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub portable: bool,
}

impl Removal {
    /// Layers that go as a whole; the others are renumbered only where nothing else goes.
    pub fn blocks(&self) -> BTreeSet<usize> {
        self.attention.intersection(&self.mlp).copied().collect()
    }

    /// Whether only whole layers go, and so the others are renumbered.
    pub fn renumbers(&self) -> bool {
        !self.attention.is_empty() && self.attention == self.mlp
    }

    /// What a configuration says of layers without attention, and without MLP.
    ///
    /// # Errors
    /// A list that holds anything but numbers of layers or as many booleans as there are layers.
    pub fn of_config(config: &Config, layers: usize) -> Result<Self> {
        let list = |key: &str| -> Result<BTreeSet<usize>> {
            let Some(value) = config.get(key).filter(|v| !v.is_null()) else { return Ok(BTreeSet::new()) };
            let wrong = || {
                let what = format!("{key} must be a list of layers from 0 to {}", layers.saturating_sub(1));
                Error::corrupt(config.path(), None, what)
            };
            let list = value.as_array().ok_or_else(wrong)?;
            if list.len() == layers && list.iter().all(Value::is_boolean) {
                let on = list.iter().enumerate().filter(|(_, v)| v.as_bool() == Some(true));
                return Ok(on.map(|(layer, _)| layer).collect());
            }
            let number = |v: &Value| {
                let n = v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n < layers);
                n.ok_or_else(wrong)
            };
            list.iter().map(number).collect()
        };
        Ok(Self { attention: list(DROP_ATTENTION_KEY)?, mlp: list(DROP_MLP_KEY)?, portable: false })
    }

    /// What a checkpoint's sub-layers hold, layer by layer: elements and bytes of attention, and of MLP. Layers that have
    /// neither are left out.
    ///
    /// # Errors
    /// No configuration, or an architecture whose sub-layers cannot be removed.
    pub fn sizes(checkpoint: &Checkpoint) -> Result<BTreeMap<usize, [Size; 2]>> {
        let config = checkpoint.config().ok_or_else(|| no_config(checkpoint))?;
        let layers = Layers::find(checkpoint, config)?;
        let mut sizes: BTreeMap<usize, [Size; 2]> = BTreeMap::new();
        for (layer, tensors) in layers.tensors.iter().filter(|(layer, _)| **layer < layers.count) {
            let of_layer = sizes.entry(*layer).or_default();
            for (name, rest) in tensors {
                let place = match layers.part(*layer, rest) {
                    Some(Part::Attention | Part::Both) => 0,
                    Some(Part::Mlp) => 1,
                    None => continue,
                };
                if let Some(tensor) = checkpoint.tensors().get(*name) {
                    let elements = tensor.shape.iter().fold(1u64, |n, d| n.saturating_mul(*d));
                    of_layer[place].elements = of_layer[place].elements.saturating_add(elements);
                    of_layer[place].bytes = of_layer[place].bytes.saturating_add(tensor.bytes);
                }
            }
        }
        Ok(sizes)
    }

    /// The edit of a checkpoint that removes these sub-layers.
    ///
    /// # Errors
    /// No configuration; layers that are not there or are without that sub-layer already; all layers; tensors of a layer that
    /// belong to neither sub-layer.
    pub fn edit(&self, checkpoint: &Checkpoint) -> Result<Edit> {
        let root = checkpoint.root();
        let config = checkpoint.config().ok_or_else(|| no_config(checkpoint))?;
        let layers = Layers::find(checkpoint, config)?;
        let before = Self::of_config(config, layers.count)?;
        let kinds = [("attention", &self.attention, &before.attention), ("MLP", &self.mlp, &before.mlp)];
        for (kind, removed, before) in kinds {
            for layer in removed {
                if *layer >= layers.count {
                    return Err(Error::Invalid(format!(
                        "there is no layer {layer} to remove the {kind} of: {} has {}",
                        root.display(),
                        layers.count
                    )));
                }
                if before.contains(layer) {
                    return Err(Error::Invalid(format!(
                        "layer {layer} of {} has no {kind} any more",
                        root.display()
                    )));
                }
            }
        }
        if self.renumbers() && self.attention.len() == layers.count {
            return Err(Error::Invalid(format!(
                "all {} layers of {} would be removed: nothing would be left",
                layers.count,
                root.display()
            )));
        }
        let mut edit = Edit::default();
        let renumbers = self.renumbers();
        for (layer, tensors) in &layers.tensors {
            for &(name, rest) in tensors {
                let removed = match layers.part(*layer, rest) {
                    Some(Part::Attention) => self.attention.contains(layer),
                    Some(Part::Mlp) => self.mlp.contains(layer),
                    Some(Part::Both) => {
                        let gone = |now: &BTreeSet<usize>, before: &BTreeSet<usize>| {
                            now.contains(layer) || before.contains(layer)
                        };
                        gone(&self.attention, &before.attention) && gone(&self.mlp, &before.mlp)
                    }
                    None if self.attention.contains(layer) || self.mlp.contains(layer) => {
                        return Err(Error::unsupported(
                            root,
                            Some(name),
                            format!(
                                "belongs to neither attention nor MLP of layer {layer}: it cannot be removed"
                            ),
                        ));
                    }
                    None => false,
                };
                if removed && self.portable && !renumbers {
                    if layers.is_last_product(rest) {
                        edit.zero.insert(name.clone());
                    }
                } else if removed {
                    edit.drop.insert(name.clone(), "pruned".to_owned());
                } else if renumbers {
                    let number = layer - self.attention.range(..layer).count();
                    let new = format!("{}{number}.{rest}", layers.prefix);
                    if new != *name {
                        edit.rename.insert(name.clone(), new);
                    }
                }
            }
        }
        if edit.drop.is_empty() && edit.zero.is_empty() && !(self.attention.is_empty() && self.mlp.is_empty())
        {
            return Err(Error::unsupported(root, None, "has no tensors of the sub-layers to remove"));
        }
        edit.config = self.config(config, &before, &layers)?;
        Ok(edit)
    }

    /// The configuration afterwards, where it changes.
    fn config(&self, config: &Config, before: &Self, layers: &Layers<'_>) -> Result<Option<String>> {
        let (count, key_of_count) = (layers.count, layers_key(layers.blueprint));
        let mut members: Vec<(&str, Value)> = Vec::new();
        if self.renumbers() {
            let kept = |list: &BTreeSet<usize>| -> Vec<usize> {
                let kept = list.iter().filter(|layer| !self.attention.contains(layer));
                kept.map(|layer| layer - self.attention.range(..layer).count()).collect()
            };
            for (key, list) in [(DROP_ATTENTION_KEY, &before.attention), (DROP_MLP_KEY, &before.mlp)] {
                if config.get(key).is_some() {
                    members.push((key, json!(kept(list))));
                }
            }
            members.push((key_of_count, json!(count - self.attention.len())));
            members.extend(self.layer_lists(config, layers.blueprint, count));
        } else if !self.portable {
            let joined = |a: &BTreeSet<usize>, b: &BTreeSet<usize>| json!(a.union(b).collect::<Vec<_>>());
            members.push((DROP_ATTENTION_KEY, joined(&self.attention, &before.attention)));
            members.push((DROP_MLP_KEY, joined(&self.mlp, &before.mlp)));
        }
        let mut text = None;
        for (key, value) in members {
            let current = match &text {
                Some(text) => Config::parse(config.path(), String::clone(text))?,
                None => config.clone(),
            };
            // What describes the decoder of a larger model belongs where its number of layers stands.
            let inside = config.own(key_of_count).is_none() && self.renumbers();
            let is_inside = config.own(key).is_none() && config.get(key).is_some();
            text = Some(match inside && config.own(key).is_none() || is_inside {
                true => current.with_text_member(key, &value)?,
                false => current.with_member(key, &value)?,
            });
        }
        Ok(text)
    }

    /// Values that are given layer by layer, without those of the removed layers.
    fn layer_lists(
        &self,
        config: &Config,
        blueprint: Option<&Blueprint>,
        count: usize,
    ) -> Vec<(&'static str, Value)> {
        let mut members = Vec::new();
        let kept = |layer: &usize| !self.attention.contains(layer);
        let below = |layer: usize| layer - self.attention.range(..layer).count();
        let number = |key: &str| config.get(key).and_then(Value::as_u64).map(|n| n as usize);
        if let Some(types) = config.get("layer_types").and_then(Value::as_array) {
            let types: Vec<&Value> = (0..count).filter(kept).filter_map(|layer| types.get(layer)).collect();
            members.push(("layer_types", json!(types)));
        } else if let Some(Windows::Pattern { keys, every, .. }) = blueprint.map(|b| b.windows) {
            // A pattern no longer fits: every layer says what it is.
            let pattern = keys.iter().find_map(|key| number(key)).unwrap_or(every);
            let kind = |layer: usize| {
                if (layer + 1).is_multiple_of(pattern.max(1)) {
                    "full_attention"
                } else {
                    "sliding_attention"
                }
            };
            members.push(("layer_types", json!((0..count).filter(kept).map(kind).collect::<Vec<_>>())));
        }
        if let Some(Turned::Listed(interval)) =
            blueprint.and_then(|b| b.rope.as_ref()).map(|rope| rope.layers)
        {
            let listed = config.get("no_rope_layers").and_then(Value::as_array);
            let interval = number("no_rope_layer_interval").unwrap_or(interval).max(1);
            let turned = |layer: usize| match listed.and_then(|list| list.get(layer)) {
                Some(said) => said.clone(),
                None => json!(u8::from(!(layer + 1).is_multiple_of(interval))),
            };
            members.push(("no_rope_layers", json!((0..count).filter(kept).map(turned).collect::<Vec<_>>())));
        }
        if let Some(first) = number("max_window_layers") {
            members.push(("max_window_layers", json!(below(first.min(count)))));
        }
        let dense = config.get("mlp_only_layers").and_then(Value::as_array);
        let step = number("decoder_sparse_step").unwrap_or(1).max(1);
        if dense.is_some() || step > 1 {
            // Every how many layers there are experts no longer holds: the layers without any are named.
            let named =
                |layer: &usize| dense.is_some_and(|d| d.iter().any(|v| v.as_u64() == Some(*layer as u64)));
            let dense =
                (0..count).filter(|layer| named(layer) || !(layer + 1).is_multiple_of(step)).filter(kept);
            members.push(("mlp_only_layers", json!(dense.map(below).collect::<Vec<_>>())));
            if step > 1 {
                members.push(("decoder_sparse_step", json!(1)));
            }
        }
        members
    }
}

/// What tensors hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Elements.
    pub elements: u64,
    /// Bytes when decoded.
    pub bytes: u64,
}

fn no_config(checkpoint: &Checkpoint) -> Error {
    let path = checkpoint.root().join(crate::CONFIG_FILE);
    Error::corrupt(path, None, "is missing: it says how many layers there are")
}

/// More than any model has, and few enough to go through.
const MAX_LAYERS: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Attention,
    Mlp,
    /// What both read goes through it.
    Both,
}

/// What the number of layers stands under.
fn layers_key(blueprint: Option<&Blueprint>) -> &'static str {
    blueprint.map_or("num_hidden_layers", |blueprint| blueprint.keys.layers)
}

/// The tensors of a decoder's layers.
struct Layers<'a> {
    prefix: String,
    count: usize,
    /// By layer: names, and what follows the layer's number in them.
    tensors: BTreeMap<usize, Vec<(&'a String, &'a str)>>,
    /// Layers that norm their outputs too, whose norms have other names.
    post_norms: BTreeSet<usize>,
    /// Of an architecture that runs; others go by the names that most have.
    blueprint: Option<&'static Blueprint>,
}

impl<'a> Layers<'a> {
    fn find(checkpoint: &'a Checkpoint, config: &Config) -> Result<Self> {
        let root = checkpoint.root();
        let blueprint = config.model_type().and_then(Blueprint::of);
        let key = layers_key(blueprint);
        let count = config
            .get(key)
            .and_then(Value::as_u64)
            .ok_or_else(|| Error::corrupt(config.path(), None, format!("{key} is missing")))?;
        let count = usize::try_from(count).ok().filter(|count| *count <= MAX_LAYERS).ok_or_else(|| {
            Error::corrupt(config.path(), None, format!("{key} is {count}, above {MAX_LAYERS}"))
        })?;
        let prefixes = match blueprint {
            Some(blueprint) => {
                let names = &blueprint.names;
                names.prefixes.iter().map(|prefix| format!("{prefix}{}.", names.layers)).collect()
            }
            None => PREFIXES.map(str::to_owned).to_vec(),
        };
        for prefix in prefixes {
            let mut tensors: BTreeMap<usize, Vec<(&String, &str)>> = BTreeMap::new();
            for name in checkpoint.tensors().keys() {
                let Some((number, rest)) = name.strip_prefix(prefix.as_str()).and_then(|n| n.split_once('.'))
                else {
                    continue;
                };
                if let Ok(layer) = number.parse() {
                    tensors.entry(layer).or_default().push((name, rest));
                }
            }
            if !tensors.is_empty() {
                let post = |names: &Vec<(&String, &str)>| {
                    names.iter().any(|(_, rest)| rest.starts_with("pre_feedforward_layernorm."))
                };
                let post_norms =
                    tensors.iter().filter(|(_, names)| post(names)).map(|(layer, _)| *layer).collect();
                return Ok(Self { prefix, count, tensors, post_norms, blueprint });
            }
        }
        Err(Error::unsupported(
            root,
            None,
            "has no tensors called model.layers.N: its architecture is not one whose sub-layers can be removed",
        ))
    }

    fn part(&self, layer: usize, rest: &str) -> Option<Part> {
        let (module, _) = rest.split_once('.')?;
        if let Some(blueprint) = self.blueprint {
            return part_of(blueprint, module);
        }
        match module {
            "self_attn" | "input_layernorm" => Some(Part::Attention),
            "mlp" | "block_sparse_moe" | "pre_feedforward_layernorm" | "post_feedforward_layernorm" => {
                Some(Part::Mlp)
            }
            "post_attention_layernorm" if self.post_norms.contains(&layer) => Some(Part::Attention),
            "post_attention_layernorm" => Some(Part::Mlp),
            _ => None,
        }
    }

    /// Whether a sub-layer adds nothing if this tensor is zero: weight and bias of its last product.
    fn is_last_product(&self, rest: &str) -> bool {
        let module = rest.rsplit_once('.').map_or(rest, |(module, _)| module);
        let Some(blueprint) = self.blueprint else {
            return ["o_proj", "down_proj", "w2"].iter().any(|last| module.ends_with(&format!(".{last}")));
        };
        let of_expert = |experts: &Experts| {
            let within = module.strip_prefix(experts.module).is_some_and(|rest| rest.starts_with('.'));
            within && module.ends_with(&format!(".{}", experts.names[2]))
        };
        module == blueprint.names.output
            || module == blueprint.names.mlp.down()
            || blueprint.experts.as_ref().is_some_and(of_expert)
    }
}

/// What most decoders' layers are called.
const PREFIXES: [&str; 4] =
    ["model.layers.", "language_model.model.layers.", "model.language_model.layers.", "layers."];

/// Which sub-layer a module of a layer belongs to.
fn part_of(blueprint: &Blueprint, module: &str) -> Option<Part> {
    let names = &blueprint.names;
    let is = |name: Option<&str>| name == Some(module);
    if is(names.attention_norm) && is(names.mlp_norm) {
        return Some(Part::Both);
    }
    let first = |path: &'static str| path.split('.').next();
    let experts = blueprint.experts.as_ref().map(|experts| experts.module);
    if is(names.attention_norm) || is(names.attention_post_norm) || is(first(names.output)) {
        Some(Part::Attention)
    } else if is(names.mlp_norm) || is(names.mlp_post_norm) || is(first(names.mlp.down())) || is(experts) {
        Some(Part::Mlp)
    } else {
        None
    }
}
