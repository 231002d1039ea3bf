//! The architectures of GGUF files that run here, and their configuration as transformers writes it.
//!
//! ```text
//! general.architecture, {arch}.embedding_length, {arch}.attention.head_count, ... --> config.json
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::metadata::{Metadata, Value as Told};
use crate::{Error, Result};

/// How a tensor's rows and names are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Llama, Mistral, SmolLM2 and whatever else is converted as Llama.
    Llama,
    /// Llama with experts.
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
    Phi3,
}

/// An architecture with the sizes that tensors are told by.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) architecture: Architecture,
    pub(super) name: String,
    pub(super) layers: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
}

/// Layers of the Gemma 3 whose attention is scaled by the size of its residual stream, and not by that of its heads.
const GEMMA3_27B_LAYERS: u64 = 62;
/// What Llama 3.1 and later scale their rotary embedding by besides a factor, which their files do not say: low and high frequency
/// factor.
const LLAMA3: [f64; 2] = [1.0, 4.0];
/// The lengths that they may have been trained on before: powers of two from 8 to a million.
const ORIGINAL: std::ops::RangeInclusive<i32> = 3..=20;
/// Most layers that are looked at one by one.
const MOST_LAYERS: u64 = 1 << 16;

impl Family {
    /// That of a file.
    ///
    /// # Errors
    /// An architecture that does not run here; a missing size.
    pub(super) fn of(path: &Path, metadata: &Metadata) -> Result<Self> {
        let name = metadata.text("general.architecture").unwrap_or_default().to_owned();
        let experts = metadata.number(&format!("{name}.expert_count")).is_some_and(|count| count > 0);
        let architecture = match (name.as_str(), experts) {
            ("llama", false) => Architecture::Llama,
            ("llama", true) => Architecture::Mixtral,
            ("qwen2", _) => Architecture::Qwen2,
            ("qwen3", _) => Architecture::Qwen3,
            ("qwen3moe", _) => Architecture::Qwen3Moe,
            ("gemma3", _) => Architecture::Gemma3,
            ("phi3", _) => Architecture::Phi3,
            _ => {
                let what = format!(
                    "is of the architecture {name:?}, whose GGUF files are not read here; these are: llama (Mistral and Mixtral too), \
                     qwen2, qwen3, qwen3moe, gemma3, phi3. Take the checkpoint that it was made from"
                );
                return Err(Error::unsupported(path, None, what));
            }
        };
        let required = |key: &str| {
            let key = format!("{name}.{key}");
            metadata.number(&key).ok_or_else(|| Error::corrupt(path, None, format!("does not say {key}")))
        };
        let (layers, heads) = (required("block_count")?, required("attention.head_count")?);
        let kv_heads = metadata.number(&format!("{name}.attention.head_count_kv")).unwrap_or(heads);
        Ok(Self { architecture, layers, heads, kv_heads, name })
    }

    /// Whether rows of query and key are interleaved: llama.cpp turns neighbours where transformers turns halves.
    pub(super) fn interleaves(&self) -> bool {
        matches!(self.architecture, Architecture::Llama | Architecture::Mixtral)
    }

    /// `config.json`. `factors` are those of rotary embeddings, and `has` says which tensors there are.
    ///
    /// # Errors
    /// A missing size; a rotary embedding that is not read.
    pub(super) fn config(
        &self,
        path: &Path,
        metadata: &Metadata,
        factors: &BTreeMap<String, Vec<f32>>,
        has: &dyn Fn(&str) -> bool,
    ) -> Result<String> {
        let of = Of { path, metadata, name: &self.name };
        let (class, model_type) = match self.architecture {
            Architecture::Llama => ("LlamaForCausalLM", "llama"),
            Architecture::Mixtral => ("MixtralForCausalLM", "mixtral"),
            Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Architecture::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
            Architecture::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
            Architecture::Phi3 => ("Phi3ForCausalLM", "phi3"),
        };
        let hidden = of.required("embedding_length")?;
        let head_dim = match of.number("attention.key_length") {
            Some(dim) => dim,
            None => hidden.checked_div(self.heads).unwrap_or(0),
        };
        let mut config = Map::new();
        // What is not said is left out.
        let mut put = |key: &str, value: Value| {
            if !value.is_null() {
                config.insert(key.to_owned(), value);
            }
        };
        put("architectures", json!([class]));
        put("model_type", json!(model_type));
        put("torch_dtype", json!("bfloat16"));
        put("hidden_size", json!(hidden));
        put("num_hidden_layers", json!(self.layers));
        put("num_attention_heads", json!(self.heads));
        put("num_key_value_heads", json!(self.kv_heads));
        put("head_dim", json!(head_dim));
        put("tie_word_embeddings", json!(!has("output.weight")));
        put("rms_norm_eps", json!(of.float("attention.layer_norm_rms_epsilon").unwrap_or(1e-5)));
        let vocab =
            of.number("vocab_size").or(metadata.texts("tokenizer.ggml.tokens").map(|t| t.len() as u64));
        put("vocab_size", json!(vocab));
        put("intermediate_size", json!(of.number("feed_forward_length")));
        put("max_position_embeddings", json!(of.number("context_length")));
        for (key, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
            put(key, json!(metadata.number(&format!("tokenizer.ggml.{id}_token_id"))));
        }
        let theta = of.float("rope.freq_base");
        put(
            "rope_theta",
            json!(theta.unwrap_or(if self.architecture == Architecture::Gemma3 { 1e6 } else { 1e4 })),
        );
        put(
            "hidden_act",
            json!(if self.architecture == Architecture::Gemma3 { "gelu_pytorch_tanh" } else { "silu" }),
        );
        let mut scaling = of.scaling()?;
        match self.architecture {
            Architecture::Llama | Architecture::Mixtral => {
                put("attention_bias", json!(has("blk.0.attn_q.bias")));
                put("mlp_bias", json!(has("blk.0.ffn_gate.bias")));
                if let Some(factors) = factors.get("rope_freqs.weight") {
                    scaling = Some(of.llama3(factors, theta.unwrap_or(1e4))?);
                }
                if self.architecture == Architecture::Mixtral {
                    put("num_local_experts", json!(of.required("expert_count")?));
                    put("num_experts_per_tok", json!(of.required("expert_used_count")?));
                }
            }
            Architecture::Qwen2 => {
                put("use_sliding_window", json!(false));
            }
            Architecture::Qwen3 => {
                put("attention_bias", json!(false));
            }
            Architecture::Qwen3Moe => {
                put("num_experts", json!(of.required("expert_count")?));
                put("num_experts_per_tok", json!(of.required("expert_used_count")?));
                put("moe_intermediate_size", json!(of.required("expert_feed_forward_length")?));
                put("decoder_sparse_step", json!(1));
                let dense = (0..self.layers.min(MOST_LAYERS))
                    .filter(|layer| has(&format!("blk.{layer}.ffn_gate.weight")));
                put("mlp_only_layers", json!(dense.collect::<Vec<_>>()));
                put("norm_topk_prob", json!(true));
            }
            Architecture::Gemma3 => {
                put("hidden_activation", json!("gelu_pytorch_tanh"));
                put("rope_local_base_freq", json!(of.float("rope.freq_base_swa").unwrap_or(1e4)));
                let scalar = match self.layers {
                    GEMMA3_27B_LAYERS => hidden.checked_div(self.heads).unwrap_or(0),
                    _ => head_dim,
                };
                put("query_pre_attn_scalar", json!(scalar));
                put("sliding_window", json!(of.number("attention.sliding_window")));
                match metadata.get(&format!("{}.attention.sliding_window_pattern", self.name)) {
                    Some(Told::Bools(local)) => {
                        let kind = |local: &bool| if *local { "sliding_attention" } else { "full_attention" };
                        put("layer_types", json!(local.iter().map(kind).collect::<Vec<_>>()));
                    }
                    _ => {
                        put(
                            "sliding_window_pattern",
                            json!(of.number("attention.sliding_window_pattern").unwrap_or(6)),
                        );
                    }
                }
                put("final_logit_softcapping", json!(of.float("final_logit_softcapping")));
            }
            Architecture::Phi3 => {
                let turned = of.number("rope.dimension_count").unwrap_or(head_dim);
                put("partial_rotary_factor", json!(turned as f64 / head_dim.max(1) as f64));
                put(
                    "sliding_window",
                    json!(of.number("attention.sliding_window").filter(|window| *window > 0)),
                );
                if let (Some(long), Some(short)) =
                    (factors.get("rope_factors_long.weight"), factors.get("rope_factors_short.weight"))
                {
                    let original = of.required("rope.scaling.original_context_length")?;
                    put("original_max_position_embeddings", json!(original));
                    let list = |all: &[f32]| all.iter().map(|x| shortest(*x)).collect::<Vec<_>>();
                    let mut said = json!({"rope_type": "longrope", "type": "longrope", "long_factor": list(long), "short_factor": list(short)});
                    if let Some(factor) = of.float("rope.scaling.attn_factor") {
                        said["attention_factor"] = json!(factor);
                    }
                    scaling = Some(said);
                }
            }
        }
        if let Some(scaling) = scaling {
            put("rope_scaling", scaling);
        }
        serde_json::to_string_pretty(&config)
            .map(|text| text + "\n")
            .map_err(|e| Error::corrupt(path, None, format!("says what is no configuration: {e}")))
    }
}

/// A number with the fewest digits that say it.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// What a file says of its architecture.
struct Of<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    name: &'a str,
}

impl Of<'_> {
    fn number(&self, key: &str) -> Option<u64> {
        self.metadata.number(&format!("{}.{key}", self.name))
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.metadata.float(&format!("{}.{key}", self.name)).filter(|value| value.is_finite())
    }

    fn required(&self, key: &str) -> Result<u64> {
        self.number(key)
            .ok_or_else(|| Error::corrupt(self.path, None, format!("does not say {}.{key}", self.name)))
    }

    /// The scaling of the rotary embedding, where it is said.
    fn scaling(&self) -> Result<Option<Value>> {
        let factor = self.float("rope.scaling.factor").unwrap_or(1.0);
        match self.metadata.text(&format!("{}.rope.scaling.type", self.name)) {
            None | Some("none" | "longrope") => Ok(None),
            Some("linear") => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            Some("yarn") => {
                let original = self.required("rope.scaling.original_context_length")?;
                Ok(Some(
                    json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}),
                ))
            }
            Some(other) => {
                let what = format!(
                    "scales its rotary embedding by {other:?}, and none, linear, yarn and longrope are read"
                );
                Err(Error::unsupported(self.path, None, what))
            }
        }
    }

    /// The scaling of Llama 3 that divides frequencies by these factors.
    fn llama3(&self, factors: &[f32], theta: f64) -> Result<Value> {
        let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
        let [low, high] = LLAMA3;
        let expected = |at: usize, original: f64| {
            let frequency = theta.powf(-(at as f64) / factors.len() as f64);
            let length = 2.0 * std::f64::consts::PI / frequency;
            if length < original / high {
                1.0
            } else if length > original / low {
                factor
            } else {
                let smooth = (original / length - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        let fits = |original: &f64| {
            let near =
                |(at, found): (usize, &f32)| (f64::from(*found) / expected(at, *original) - 1.0).abs() < 1e-4;
            factors.iter().enumerate().all(near)
        };
        // Several fit where no frequency lies between: they say the same.
        let Some(original) = ORIGINAL.map(|power| 2f64.powi(power)).find(fits) else {
            let what = "holds factors that are not those of Llama 3: convert the original model instead";
            return Err(Error::unsupported(self.path, Some("rope_freqs.weight"), what));
        };
        Ok(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original as u64,
        }))
    }
}
