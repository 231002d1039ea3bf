//! What a decoder is, read from `config.json` as transformers 4 and 5 write it.
//!
//! ```text
//! model_type --> family --> sizes, norms, biases          the same for all layers
//!                       --> window, rotary embedding, MLP  layer by layer
//! ```

use llmpress_formats::{Config, Error, Removal, Result};
use serde_json::Value;

use crate::rope::RopeConfig;

/// Most layers, heads, experts and the like that a configuration may ask for.
const MAX_COUNT: usize = 1 << 16;
/// Largest size of a dimension.
const MAX_SIZE: usize = 1 << 30;

/// The architectures that run here, by their `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3.x, SmolLM2 and everything else that loads as `LlamaForCausalLM`.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: a norm on each head's query and key.
    Qwen3,
    /// Qwen3 with experts.
    Qwen3Moe,
    /// The text model of Gemma 3.
    Gemma3,
    /// Phi-3 and Phi-4-mini: query, key and value in one matrix, gate and up in another.
    Phi3,
    /// Mixtral: Mistral with experts.
    Mixtral,
}

impl Family {
    /// Every `model_type` that runs.
    pub const MODEL_TYPES: [&'static str; 9] =
        ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "gemma3_text", "phi3", "mixtral"];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "Llama",
            Self::Mistral => "Mistral",
            Self::Qwen2 => "Qwen2",
            Self::Qwen3 => "Qwen3",
            Self::Qwen3Moe => "Qwen3 MoE",
            Self::Gemma3 => "Gemma 3",
            Self::Phi3 => "Phi-3",
            Self::Mixtral => "Mixtral",
        }
    }

    fn of(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "llama" => Self::Llama,
            "mistral" => Self::Mistral,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "qwen3_moe" => Self::Qwen3Moe,
            "gemma3" | "gemma3_text" => Self::Gemma3,
            "phi3" => Self::Phi3,
            "mixtral" => Self::Mixtral,
            _ => return None,
        })
    }
}

/// The function inside a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

/// The MLP of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpConfig {
    /// One gated MLP.
    Dense {
        /// Its inner size.
        intermediate: usize,
    },
    /// A router and gated MLPs of which it picks some for each token.
    Experts {
        /// Their inner size.
        intermediate: usize,
        /// How many there are.
        count: usize,
        /// How many a token goes through.
        top_k: usize,
        /// Whether the weights of the picked ones are scaled to a sum of one.
        normalise: bool,
    },
}

/// What may differ from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// How many tokens a token sees, itself included; all before it where there is no limit.
    pub window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] it uses.
    pub rope: usize,
    /// Its MLP.
    pub mlp: MlpConfig,
    /// Whether its attention was pruned away.
    pub no_attention: bool,
    /// Whether its MLP was pruned away.
    pub no_mlp: bool,
}

/// A decoder.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The architecture.
    pub family: Family,
    /// Size of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Entries of the vocabulary, where the configuration says.
    pub vocab_size: Option<usize>,
    /// The longest sequence that the model was made for, where the configuration says.
    pub max_positions: Option<usize>,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Inside the MLP.
    pub activation: Activation,
    /// Biases on query, key and value.
    pub qkv_bias: bool,
    /// A bias on the attention's output.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Scores are multiplied by this.
    pub attention_scale: f32,
    /// Logits `l` become `c tanh(l / c)`.
    pub final_softcap: Option<f32>,
    /// Whether the head is the embedding, where the configuration or the family says.
    pub tied: Option<bool>,
    /// The layers.
    pub layers: Vec<LayerConfig>,
    /// The rotary embeddings that they use.
    pub ropes: Vec<RopeConfig>,
}

impl ModelConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture or a feature that does not run here, [`Error::Corrupt`]
    /// for values that make no sense; both name the key.
    pub fn parse(config: &Config) -> Result<Self> {
        let f = Fields { config };
        let model_type = config.model_type().ok_or_else(|| f.missing("model_type"))?;
        let family = Family::of(model_type).ok_or_else(|| {
            f.unsupported(format!(
                "model_type {model_type:?} does not run here; these do: {}",
                Family::MODEL_TYPES.join(", ")
            ))
        })?;
        let gemma = family == Family::Gemma3;
        let hidden_size = f.size("hidden_size")?.ok_or_else(|| f.missing("hidden_size"))?;
        let count = f.count("num_hidden_layers")?.ok_or_else(|| f.missing("num_hidden_layers"))?;
        let heads = f.count("num_attention_heads")?.or(gemma.then_some(8));
        let heads = heads.ok_or_else(|| f.missing("num_attention_heads"))?;
        let kv_heads = f.count("num_key_value_heads")?.unwrap_or(if gemma { 4 } else { heads });
        if !heads.is_multiple_of(kv_heads) {
            return Err(f.corrupt(format!(
                "num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )));
        }
        let head_dim = match (f.size("head_dim")?, family) {
            (Some(dim), _) => dim,
            (None, Family::Gemma3) => 256,
            (None, Family::Qwen3 | Family::Qwen3Moe) => 128,
            (None, _) if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            (None, _) => {
                return Err(f.corrupt(format!(
                    "hidden_size {hidden_size} is no multiple of num_attention_heads {heads}"
                )));
            }
        };
        let intermediate = f.size("intermediate_size")?;
        let attention_bias = f.flag("attention_bias")?.unwrap_or(false);
        let scalar = f.number("query_pre_attn_scalar")?.unwrap_or(256.0);
        let attention_scale = if gemma { scalar } else { head_dim as f64 }.powf(-0.5) as f32;
        let (ropes, by_layer) = RopeConfig::of_model(config, family, head_dim)?;
        let windows = windows(&f, family, count)?;
        let removed = Removal::of_config(config, count)?;
        let layers = (0..count)
            .map(|layer| {
                let mlp = match expert_mlp(&f, family, layer)? {
                    Some(mlp) => mlp,
                    None => MlpConfig::Dense {
                        intermediate: intermediate.ok_or_else(|| f.missing("intermediate_size"))?,
                    },
                };
                let window = windows[layer];
                let rope = usize::from(by_layer && window.is_some());
                let (no_attention, no_mlp) =
                    (removed.attention.contains(&layer), removed.mlp.contains(&layer));
                Ok(LayerConfig { window, rope, mlp, no_attention, no_mlp })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            family,
            hidden_size,
            heads,
            kv_heads,
            head_dim,
            vocab_size: f.size("vocab_size")?,
            max_positions: config
                .get("max_position_embeddings")
                .and_then(Value::as_u64)
                .and_then(|n| usize::try_from(n).ok()),
            rms_norm_eps: match (f.number("rms_norm_eps")?, family) {
                (Some(eps), _) => eps as f32,
                (None, Family::Phi3 | Family::Mixtral) => 1e-5,
                (None, _) => 1e-6,
            },
            activation: activation(&f, gemma)?,
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias,
            mlp_bias: f.flag("mlp_bias")?.unwrap_or(false) && family == Family::Llama,
            attention_scale,
            final_softcap: f.number("final_logit_softcapping")?.filter(|_| gemma).map(|c| c as f32),
            tied: config.tie_word_embeddings().or(gemma.then_some(true)),
            layers,
            ropes,
        })
    }

    /// Whether norms multiply by `1 + weight`.
    pub fn norm_offset(&self) -> bool {
        self.family == Family::Gemma3
    }

    /// Whether the outputs of attention and MLP are normed too.
    pub fn post_norms(&self) -> bool {
        self.family == Family::Gemma3
    }

    /// Whether each head's query and key are normed.
    pub fn qk_norm(&self) -> bool {
        matches!(self.family, Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3)
    }

    /// What the embedding is multiplied by.
    pub fn embedding_scale(&self) -> f32 {
        if self.family == Family::Gemma3 { (self.hidden_size as f64).sqrt() as f32 } else { 1.0 }
    }
}

fn activation(f: &Fields<'_>, gemma: bool) -> Result<Activation> {
    let key =
        if gemma && f.config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    match f.config.get(key).and_then(Value::as_str) {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => Err(f.unsupported(format!("{key} {other:?}; silu and gelu_pytorch_tanh run here"))),
        None if gemma => Ok(Activation::GeluTanh),
        None => Ok(Activation::Silu),
    }
}

/// The window of each layer.
fn windows(f: &Fields<'_>, family: Family, count: usize) -> Result<Vec<Option<usize>>> {
    let window = f.size("sliding_window")?;
    if let Some(types) = f.config.get("layer_types").filter(|v| !v.is_null()) {
        let types = types.as_array().filter(|t| t.len() == count).ok_or_else(|| {
            f.corrupt(format!("layer_types must be a list of {count} names, one for each layer"))
        })?;
        return types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => window.map(Some).ok_or_else(|| f.missing("sliding_window")),
                _ => Err(
                    f.unsupported(format!("layer_types: {t}; full_attention and sliding_attention run here"))
                ),
            })
            .collect();
    }
    let used = f.flag("use_sliding_window")?.unwrap_or(false);
    Ok(match family {
        Family::Llama => vec![None; count],
        Family::Mistral | Family::Mixtral | Family::Phi3 => vec![window; count],
        Family::Qwen3Moe => vec![window.filter(|_| used); count],
        Family::Qwen2 | Family::Qwen3 => {
            let first = f.index("max_window_layers")?.unwrap_or(28);
            (0..count).map(|layer| window.filter(|_| used && layer >= first)).collect()
        }
        Family::Gemma3 => {
            let pattern = match f.count("sliding_window_pattern")? {
                Some(pattern) => pattern,
                None => f.count("_sliding_window_pattern")?.unwrap_or(6),
            };
            let window = window.unwrap_or(4096);
            (0..count).map(|layer| ((layer + 1) % pattern != 0).then_some(window)).collect()
        }
    })
}

/// The experts of a layer, if it has them.
fn expert_mlp(f: &Fields<'_>, family: Family, layer: usize) -> Result<Option<MlpConfig>> {
    let (count, intermediate, normalise) = match family {
        Family::Mixtral => ("num_local_experts", "intermediate_size", true),
        Family::Qwen3Moe => {
            let step = f.count("decoder_sparse_step")?.unwrap_or(1);
            let dense = f.config.get("mlp_only_layers").and_then(Value::as_array);
            let dense = dense.is_some_and(|l| l.iter().any(|v| v.as_u64() == Some(layer as u64)));
            if dense || !(layer + 1).is_multiple_of(step) {
                return Ok(None);
            }
            // transformers 5 writes the name that Mixtral has.
            let key = if f.config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
            (key, "moe_intermediate_size", f.flag("norm_topk_prob")?.unwrap_or(false))
        }
        _ => return Ok(None),
    };
    let (count, key) = (f.count(count)?.ok_or_else(|| f.missing(count))?, count);
    let top_k = f.count("num_experts_per_tok")?.ok_or_else(|| f.missing("num_experts_per_tok"))?;
    if top_k > count {
        return Err(f.corrupt(format!("num_experts_per_tok {top_k} exceeds {key} {count}")));
    }
    let intermediate = f.size(intermediate)?.ok_or_else(|| f.missing(intermediate))?;
    Ok(Some(MlpConfig::Experts { intermediate, count, top_k, normalise }))
}

/// Typed access to the values, with errors that name the key.
struct Fields<'a> {
    config: &'a Config,
}

impl Fields<'_> {
    fn corrupt(&self, what: String) -> Error {
        Error::corrupt(self.config.path(), None, what)
    }

    fn unsupported(&self, what: String) -> Error {
        Error::unsupported(self.config.path(), None, what)
    }

    fn missing(&self, key: &str) -> Error {
        self.corrupt(format!("{key} is missing"))
    }

    fn integer(&self, key: &str, range: std::ops::RangeInclusive<usize>) -> Result<Option<usize>> {
        match self.config.get(key).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| range.contains(n))
                .map(Some)
                .ok_or_else(|| {
                    self.corrupt(format!("{key} is {value}; it must be {} to {}", range.start(), range.end()))
                }),
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.integer(key, 1..=MAX_SIZE)
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        self.integer(key, 1..=MAX_COUNT)
    }

    fn index(&self, key: &str) -> Result<Option<usize>> {
        self.integer(key, 0..=MAX_COUNT)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.config.get(key).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(n) if n > 0.0 => Ok(Some(n)),
                _ => Err(self.corrupt(format!("{key} is {value}; it must be a positive number"))),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.config.get(key).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => Err(self.corrupt(format!("{key} is {value}; it must be true or false"))),
        }
    }
}
