//! Which layer and which sub-layer of a decoder a tensor belongs to, by its name.
//!
//! ```text
//! model.layers.7.self_attn.q_proj.weight      transformer.h.7.mlp.c_proj.bias      layer 7: attention, MLP
//! ```

use crate::blueprint::{DeltaNames, Experts};
use crate::{Blueprint, Config};

/// What a tensor of a layer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Attention, with its norms.
    Attention,
    /// MLP or experts, with their norms.
    Mlp,
    /// A norm that both read through.
    Both,
}

/// The names of an architecture that runs here; of others those that most decoders have.
#[derive(Clone, Copy, Debug)]
pub struct LayerNames {
    blueprint: Option<&'static Blueprint>,
}

/// What most decoders' names begin with.
const PREFIXES: [&str; 4] = ["model.", "language_model.model.", "model.language_model.", ""];

impl LayerNames {
    /// Those of a configuration.
    pub fn of(config: Option<&Config>) -> Self {
        Self { blueprint: config.and_then(Config::model_type).and_then(Blueprint::of) }
    }

    /// The architecture, where it runs here.
    pub fn blueprint(&self) -> Option<&'static Blueprint> {
        self.blueprint
    }

    /// What the configuration calls the number of layers.
    pub fn count_key(&self) -> &'static str {
        self.blueprint.map_or("num_hidden_layers", |blueprint| blueprint.keys.layers)
    }

    /// What the names of layers may begin with, before their number.
    pub fn prefixes(&self) -> Vec<String> {
        let (prefixes, layers) = match self.blueprint {
            Some(blueprint) => (blueprint.names.prefixes, blueprint.names.layers),
            None => (&PREFIXES[..], "layers"),
        };
        prefixes.iter().map(|prefix| format!("{prefix}{layers}.")).collect()
    }

    /// The layer of a tensor, and what follows its number in the name.
    pub fn split<'n>(&self, name: &'n str) -> Option<(usize, &'n str)> {
        self.prefixes().iter().find_map(|prefix| {
            let (number, rest) = name.strip_prefix(prefix.as_str())?.split_once('.')?;
            Some((number.parse().ok()?, rest))
        })
    }

    /// What a tensor of a layer belongs to, by what follows the layer's number. `post_norms`: whether the layer norms what its sub-layers
    /// give out, which tells norms of other architectures apart.
    pub fn part(&self, rest: &str, post_norms: bool) -> Option<Part> {
        let (module, _) = rest.split_once('.')?;
        if let Some(blueprint) = self.blueprint {
            return part_of(blueprint, module);
        }
        match module {
            "self_attn" | "input_layernorm" => Some(Part::Attention),
            "mlp" | "block_sparse_moe" | "pre_feedforward_layernorm" | "post_feedforward_layernorm" => {
                Some(Part::Mlp)
            }
            "post_attention_layernorm" if post_norms => Some(Part::Attention),
            "post_attention_layernorm" => Some(Part::Mlp),
            _ => None,
        }
    }

    /// Whether a sub-layer adds nothing if this tensor is zero: weight and bias of its last product.
    pub fn is_last_product(&self, rest: &str) -> bool {
        let module = rest.rsplit_once('.').map_or(rest, |(module, _)| module);
        let Some(blueprint) = self.blueprint else {
            return ["o_proj", "down_proj", "w2"].iter().any(|last| module.ends_with(&format!(".{last}")));
        };
        let of_expert = |experts: &Experts| {
            let stacked = experts.stacked.as_ref().is_some_and(|stacked| {
                let down = format!("{}.experts.{}", experts.module, stacked.names[1]);
                rest.strip_prefix(&down).is_some_and(|end| end.is_empty() || end == "_bias")
            });
            if stacked {
                return true;
            }
            let within = module.strip_prefix(experts.module).is_some_and(|rest| rest.starts_with('.'));
            within && module.ends_with(&format!(".{}", experts.names[2]))
        };
        let of_delta = |delta: &DeltaNames| module.strip_prefix(delta.module) == Some(".out_proj");
        module == blueprint.names.output
            || blueprint.mixers.delta.as_ref().is_some_and(of_delta)
            || module == blueprint.names.mlp.down()
            || blueprint.experts.as_ref().is_some_and(of_expert)
    }
}

fn part_of(blueprint: &'static Blueprint, module: &str) -> Option<Part> {
    let names = &blueprint.names;
    let is = |name: Option<&str>| name == Some(module);
    if is(names.attention_norm) && is(names.mlp_norm) {
        return Some(Part::Both);
    }
    let first = |path: &'static str| path.split('.').next();
    let experts = blueprint.experts.as_ref().map(|experts| experts.module);
    let delta = blueprint.mixers.delta.as_ref().map(|delta| delta.module);
    if is(names.attention_norm) || is(names.attention_post_norm) || is(first(names.output)) || is(delta) {
        Some(Part::Attention)
    } else if is(names.mlp_norm) || is(names.mlp_post_norm) || is(first(names.mlp.down())) || is(experts) {
        Some(Part::Mlp)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn tensors_of_every_architecture_belong_to_a_layer_and_a_sub_layer() {
        let of = |model_type: &str| {
            let text = format!(r#"{{"model_type": "{model_type}"}}"#);
            LayerNames::of(Some(&Config::parse(Path::new("config.json"), text).unwrap()))
        };
        for (model_type, name, part, last) in [
            ("llama", "model.layers.12.self_attn.o_proj.weight", Part::Attention, true),
            ("llama", "model.layers.0.post_attention_layernorm.weight", Part::Mlp, false),
            (
                "gemma3",
                "language_model.model.layers.3.post_attention_layernorm.weight",
                Part::Attention,
                false,
            ),
            ("mixtral", "model.layers.3.block_sparse_moe.experts.1.w2.weight", Part::Mlp, true),
            ("mixtral", "model.layers.3.block_sparse_moe.gate.weight", Part::Mlp, false),
            ("qwen3_moe", "model.layers.3.mlp.experts.7.down_proj.weight", Part::Mlp, true),
            ("olmo2", "model.layers.1.post_attention_layernorm.weight", Part::Attention, false),
            ("glm4", "model.layers.1.post_attention_layernorm.weight", Part::Mlp, false),
            ("glm4", "model.layers.1.post_self_attn_layernorm.weight", Part::Attention, false),
            ("cohere2", "model.layers.1.input_layernorm.weight", Part::Both, false),
            ("starcoder2", "model.layers.1.mlp.c_proj.bias", Part::Mlp, true),
            ("gpt2", "transformer.h.11.attn.c_proj.bias", Part::Attention, true),
            ("gpt2", "h.0.mlp.c_fc.weight", Part::Mlp, false),
            ("gpt_oss", "model.layers.1.mlp.experts.down_proj", Part::Mlp, true),
            ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", Part::Mlp, true),
            ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", Part::Mlp, false),
            ("gpt_oss", "model.layers.1.self_attn.sinks", Part::Attention, false),
            ("deepseek_v3", "model.layers.3.mlp.shared_experts.down_proj.weight", Part::Mlp, true),
            ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", Part::Mlp, false),
            ("qwen3_next", "model.layers.0.linear_attn.out_proj.weight", Part::Attention, true),
            ("qwen3_next", "model.layers.0.linear_attn.A_log", Part::Attention, false),
            ("llama4", "language_model.model.layers.1.feed_forward.experts.down_proj", Part::Mlp, true),
            ("unheard", "model.layers.3.mlp.down_proj.weight", Part::Mlp, true),
            ("unheard", "layers.3.input_layernorm.weight", Part::Attention, false),
        ] {
            let names = of(model_type);
            let (_, rest) = names.split(name).unwrap();
            assert_eq!(names.part(rest, false), Some(part), "{model_type} {name}");
            assert_eq!(names.is_last_product(rest), last, "{model_type} {name}");
        }
        for name in ["model.embed_tokens.weight", "model.layers.x.mlp.weight", "lm_head.weight", "layers.1"] {
            assert_eq!(of("unheard").split(name), None);
        }
        assert_eq!(of("gpt2").count_key(), "n_layer");
    }
}
