//! The configuration of a model as the metadata of a GGUF file.
//!
//! ```text
//! config.json --> {arch}.embedding_length, {arch}.attention.head_count, ...     and factors of rotary embeddings, as tensors
//! ```
//!
//! What llama.cpp would compute otherwise is refused, or the length of texts is bounded to where it is the same.

use std::f64::consts::TAU;

use llmpress_formats::{Checkpoint, Error as FormatError, GgufValue};
use llmpress_model::{Activation, MlpConfig, ModelConfig, Scaling};

use super::family::Family;
use crate::Result;

/// Layers from one without a window to the next in Gemma 3, and the base of the others' rotary embedding: llama.cpp knows no others.
const GEMMA3_PERIOD: usize = 6;
const GEMMA3_LOCAL_BASE: f64 = 1e4;
/// Layers of the Gemma 3 whose attention is scaled by the size of its residual stream.
const GEMMA3_27B_LAYERS: usize = 62;

/// What metadata say of a configuration.
#[derive(Debug)]
pub(super) struct Said {
    /// Keys and values.
    pub(super) values: Vec<(String, GgufValue)>,
    /// Factors of rotary embeddings, by the names of their tensors.
    pub(super) factors: Vec<(&'static str, Vec<f32>)>,
    /// What is not as it was, in words.
    pub(super) notes: Vec<String>,
}

/// The keys of a model.
///
/// # Errors
/// What llama.cpp does not compute so, by the name of its key in `config.json`.
pub(super) fn said(checkpoint: &Checkpoint, config: &ModelConfig, family: Family) -> Result<Said> {
    let mut of = Of {
        checkpoint,
        family,
        arch: family.architecture(),
        said: Said { values: Vec::new(), factors: Vec::new(), notes: Vec::new() },
    };
    of.sizes(config)?;
    of.attention(config)?;
    of.experts(config)?;
    of.rotary(config)?;
    Ok(of.said)
}

struct Of<'a> {
    checkpoint: &'a Checkpoint,
    family: Family,
    arch: &'static str,
    said: Said,
}

impl Of<'_> {
    fn refuse<T>(&self, what: String) -> Result<T> {
        let path = self.checkpoint.config().map_or(self.checkpoint.root(), |config| config.path());
        Err(FormatError::unsupported(path, None, what).into())
    }

    fn number(&mut self, key: &str, value: usize) -> Result<()> {
        match u32::try_from(value) {
            Ok(value) => self.said.values.push((format!("{}.{key}", self.arch), GgufValue::Number(value))),
            Err(_) => return self.refuse(format!("{key} is {value}, and GGUF has 32 bits for it")),
        }
        Ok(())
    }

    fn float(&mut self, key: &str, value: f64) {
        self.said.values.push((format!("{}.{key}", self.arch), GgufValue::Float(value as f32)));
    }

    fn sizes(&mut self, config: &ModelConfig) -> Result<()> {
        let gemma = self.family == Family::Gemma3;
        if config.activation != (if gemma { Activation::GeluTanh } else { Activation::Silu }) {
            return self
                .refuse(format!("hidden_act: llama.cpp has another function in the MLP of {}", self.arch));
        }
        self.number("block_count", config.layers.len())?;
        if let Some(length) = self.context(config)? {
            self.number("context_length", length)?;
        }
        self.number("embedding_length", config.hidden_size)?;
        let dense = config.layers.iter().find_map(|layer| match layer.mlp {
            MlpConfig::Dense { intermediate } => Some(intermediate),
            MlpConfig::Plain { .. } | MlpConfig::Experts { .. } => None,
        });
        let own = self.checkpoint.config().and_then(|c| c.get("intermediate_size")?.as_u64());
        let inner = dense.or(own.and_then(|size| usize::try_from(size).ok()));
        self.number("feed_forward_length", inner.unwrap_or(0))?;
        let embedding = self.checkpoint.tensor("model.embed_tokens.weight")?;
        let rows = embedding.shape.first().and_then(|rows| usize::try_from(*rows).ok());
        self.number("vocab_size", rows.or(config.vocab_size).unwrap_or(0))
    }

    /// The longest text, which windows bound where llama.cpp has none.
    fn context(&mut self, config: &ModelConfig) -> Result<Option<usize>> {
        let window = config.layers.iter().filter_map(|layer| layer.window).min();
        let Some(window) = window else { return Ok(config.max_positions) };
        if self.family == Family::Gemma3 {
            let sixth = |(number, window): (usize, Option<usize>)| {
                window.is_none() == (number + 1).is_multiple_of(GEMMA3_PERIOD)
            };
            if !config.layers.iter().map(|layer| layer.window).enumerate().all(sixth) {
                return self.refuse(
                    "layer_types: in llama.cpp every sixth layer of Gemma 3 alone has no window".into(),
                );
            }
            self.number("attention.sliding_window", window)?;
            return Ok(config.max_positions);
        }
        if self.family == Family::Phi3 {
            // As llama.cpp's converter says it; what reads it may still look further back.
            self.number("attention.sliding_window", window)?;
        }
        let bounded = config.max_positions.map_or(window, |most| most.min(window));
        if config.max_positions.is_none_or(|most| most > window) {
            self.said.notes.push(format!(
                "texts have at most {window} tokens, the window of its attention: llama.cpp has none for {}",
                self.arch
            ));
        }
        Ok(Some(bounded))
    }

    fn attention(&mut self, config: &ModelConfig) -> Result<()> {
        self.number("attention.head_count", config.heads)?;
        self.number("attention.head_count_kv", config.kv_heads)?;
        self.number("attention.key_length", config.head_dim)?;
        self.number("attention.value_length", config.head_dim)?;
        self.float("attention.layer_norm_rms_epsilon", f64::from(config.norm_eps));
        let scaled_by = match self.family {
            Family::Gemma3 if config.layers.len() == GEMMA3_27B_LAYERS => {
                config.hidden_size.checked_div(config.heads).unwrap_or(0)
            }
            _ => config.head_dim,
        };
        if config.attention_scale != (scaled_by as f64).powf(-0.5) as f32 {
            return self.refuse(format!("query_pre_attn_scalar: llama.cpp has {scaled_by} for such a model"));
        }
        let biases = match self.family {
            Family::Llama => true,
            Family::Qwen2 => !config.o_bias,
            _ => !config.qkv_bias,
        };
        if !biases {
            return self.refuse(format!("attention_bias: llama.cpp has none there for {}", self.arch));
        }
        if let Some(cap) = config.final_softcap {
            self.float("final_logit_softcapping", f64::from(cap));
        }
        Ok(())
    }

    fn experts(&mut self, config: &ModelConfig) -> Result<()> {
        let experts = config.layers.iter().find_map(|layer| match layer.mlp {
            MlpConfig::Experts { intermediate, count, picks, .. } => Some((intermediate, count, picks)),
            MlpConfig::Dense { .. } | MlpConfig::Plain { .. } => None,
        });
        let Some((intermediate, count, picks)) = experts else { return Ok(()) };
        if !picks.normalise {
            return self
                .refuse("norm_topk_prob: in llama.cpp the weights of experts always sum to one".into());
        }
        self.number("expert_count", count)?;
        self.number("expert_used_count", picks.top_k)?;
        if self.family == Family::Qwen3Moe {
            self.number("expert_feed_forward_length", intermediate)?;
        }
        Ok(())
    }

    fn rotary(&mut self, config: &ModelConfig) -> Result<()> {
        let Some(rope) = config.ropes.first() else { return Ok(()) };
        let local = config.ropes.get(1);
        if local.is_some_and(|rope| *rope.scaling() != Scaling::None || rope.theta() != GEMMA3_LOCAL_BASE) {
            return self.refuse("rope_local_base_freq: llama.cpp has 10000, not scaled".into());
        }
        self.number("rope.dimension_count", rope.dim())?;
        self.float("rope.freq_base", rope.theta());
        let llama = self.arch == "llama";
        match rope.scaling() {
            Scaling::None => {}
            Scaling::Linear { factor } => {
                self.scaling("linear");
                self.float("rope.scaling.factor", *factor);
            }
            Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention } => {
                let usual = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
                if (*beta_fast, *beta_slow, *truncate, *attention) != (32.0, 1.0, true, usual) {
                    return self.refuse("rope_scaling: of YaRN, GGUF says factor and length alone".into());
                }
                self.scaling("yarn");
                self.float("rope.scaling.factor", *factor);
                self.number("rope.scaling.original_context_length", *original as usize)?;
            }
            Scaling::Llama3 { factor, low, high, original } if llama => {
                let power = (*original as u64).is_power_of_two() && (8.0..=1_048_576.0).contains(original);
                if (*low, *high) != (1.0, 4.0) || !power {
                    return self.refuse(
                        "rope_scaling: factors of Llama 3 are read again where low and high are 1 and 4, and the length a \
                         power of two"
                            .into(),
                    );
                }
                let divisor = |pair: usize| {
                    let turns = original * rope.theta().powf(-2.0 * pair as f64 / rope.dim() as f64) / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    if kept == 0.0 { *factor } else { 1.0 / ((1.0 - kept) / factor + kept) }
                };
                let factors = (0..rope.dim() / 2).map(|pair| divisor(pair) as f32);
                self.said.factors.push(("rope_freqs.weight", factors.collect()));
            }
            Scaling::LongRope { short, long, original, attention } if self.family == Family::Phi3 => {
                self.number("rope.scaling.original_context_length", *original as usize)?;
                self.float("rope.scaling.attn_factor", *attention);
                for (name, factors) in
                    [("rope_factors_long.weight", long), ("rope_factors_short.weight", short)]
                {
                    self.said.factors.push((name, factors.iter().map(|factor| *factor as f32).collect()));
                }
            }
            Scaling::Llama3 { .. } | Scaling::LongRope { .. } | Scaling::Dynamic { .. } => {
                return self.refuse(format!("rope_scaling: such a scaling cannot be said for {}", self.arch));
            }
        }
        Ok(())
    }

    fn scaling(&mut self, kind: &str) {
        self.said.values.push((format!("{}.rope.scaling.type", self.arch), GgufValue::Text(kind.to_owned())));
    }
}
