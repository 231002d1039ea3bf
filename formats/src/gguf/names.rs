//! Names and rows of a GGUF file's tensors, as transformers has them.
//!
//! ```text
//! blk.3.attn_q.weight         model.layers.3.self_attn.q_proj.weight     rows of heads interleaved, where the architecture is Llama's
//! blk.3.ffn_gate_exps.weight  model.layers.3.mlp.experts.E.gate_proj.weight    one for each of its experts
//! ```

use std::path::Path;

use super::family::{Architecture, Family};
use super::metadata::Stored;
use crate::{Error, Result};

/// Most experts of a layer.
const MAX_EXPERTS: u64 = 1 << 16;
/// Factors of rotary embeddings: they belong to the configuration.
const FACTORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// Whether a tensor holds factors of a rotary embedding.
pub(super) fn is_factors(name: &str) -> bool {
    FACTORS.contains(&name)
}

/// A tensor of the checkpoint.
#[derive(Debug)]
pub(super) struct Logical {
    pub(super) name: String,
    pub(super) shape: Vec<u64>,
    /// Heads whose rows are interleaved.
    pub(super) heads: Option<u64>,
    pub(super) offset_by_one: bool,
    /// Which of how many equal parts of what is stored it is.
    pub(super) part: Option<(u64, u64)>,
}

impl Family {
    /// What a stored tensor is: one, as many as a layer has experts, or none.
    ///
    /// # Errors
    /// A name that the architecture does not have; a shape that does not fit.
    pub(super) fn logical(&self, path: &Path, stored: &Stored) -> Result<Vec<Logical>> {
        let plain = |name: String| Logical {
            name,
            shape: stored.shape.clone(),
            heads: None,
            offset_by_one: false,
            part: None,
        };
        let unknown = || {
            let what = format!("is no tensor of the architecture {} that is known here", self.name);
            Error::unsupported(path, Some(&stored.name), what)
        };
        let norm = |name: String| Logical {
            offset_by_one: self.architecture == Architecture::Gemma3,
            ..plain(name)
        };
        match stored.name.as_str() {
            "token_embd.weight" => return Ok(vec![plain("model.embed_tokens.weight".to_owned())]),
            "output_norm.weight" => return Ok(vec![norm("model.norm.weight".to_owned())]),
            "output.weight" => return Ok(vec![plain("lm_head.weight".to_owned())]),
            name if is_factors(name) => return Ok(Vec::new()),
            _ => {}
        }
        let rest = stored.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let (layer, rest) = rest.ok_or_else(unknown)?;
        let layer = layer.parse::<u64>().ok().filter(|layer| *layer < self.layers);
        let layer = layer.ok_or_else(unknown)?;
        let (stem, last) = rest
            .rsplit_once('.')
            .filter(|(_, last)| ["weight", "bias"].contains(last))
            .ok_or_else(unknown)?;
        let of = |name: &str| format!("model.layers.{layer}.{name}.{last}");
        if let Some(name) = self.norm(stem) {
            return Ok(vec![norm(of(name))]);
        }
        if let Some(name) = self.expert(stem) {
            return self.experts(path, stored, |expert| of(&name.replace('*', &expert.to_string())));
        }
        let name = self.linear(stem).ok_or_else(unknown)?;
        let heads = match (self.interleaves(), stem) {
            (true, "attn_q") => Some(self.heads),
            (true, "attn_k") => Some(self.kv_heads),
            _ => None,
        };
        let rows = stored.shape.first().copied().unwrap_or(0);
        if let Some(heads) = heads.filter(|heads| *heads == 0 || !rows.is_multiple_of(2 * heads)) {
            let what = format!("has {rows} rows, which {heads} heads do not share evenly");
            return Err(Error::corrupt(path, Some(&stored.name), what));
        }
        Ok(vec![Logical { heads, ..plain(of(name)) }])
    }

    /// Norms of a layer.
    fn norm(&self, stem: &str) -> Option<&'static str> {
        let gemma = self.architecture == Architecture::Gemma3;
        Some(match stem {
            "attn_norm" => "input_layernorm",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "ffn_norm" if gemma => "pre_feedforward_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            "post_attention_norm" if gemma => "post_attention_layernorm",
            "post_ffw_norm" if gemma => "post_feedforward_layernorm",
            _ => return None,
        })
    }

    /// Matrices of a layer.
    fn linear(&self, stem: &str) -> Option<&'static str> {
        Some(match (stem, self.architecture) {
            ("attn_q", _) => "self_attn.q_proj",
            ("attn_k", _) => "self_attn.k_proj",
            ("attn_v", _) => "self_attn.v_proj",
            ("attn_output", _) => "self_attn.o_proj",
            ("attn_qkv", Architecture::Phi3) => "self_attn.qkv_proj",
            ("ffn_up", Architecture::Phi3) => "mlp.gate_up_proj",
            ("ffn_gate_inp", Architecture::Mixtral) => "block_sparse_moe.gate",
            ("ffn_gate_inp", Architecture::Qwen3Moe) => "mlp.gate",
            ("ffn_gate", _) => "mlp.gate_proj",
            ("ffn_up", _) => "mlp.up_proj",
            ("ffn_down", _) => "mlp.down_proj",
            _ => return None,
        })
    }

    /// Matrices of all experts of a layer; `*` stands for the expert.
    fn expert(&self, stem: &str) -> Option<&'static str> {
        Some(match (stem, self.architecture) {
            ("ffn_gate_exps", Architecture::Mixtral) => "block_sparse_moe.experts.*.w1",
            ("ffn_down_exps", Architecture::Mixtral) => "block_sparse_moe.experts.*.w2",
            ("ffn_up_exps", Architecture::Mixtral) => "block_sparse_moe.experts.*.w3",
            ("ffn_gate_exps", Architecture::Qwen3Moe) => "mlp.experts.*.gate_proj",
            ("ffn_down_exps", Architecture::Qwen3Moe) => "mlp.experts.*.down_proj",
            ("ffn_up_exps", Architecture::Qwen3Moe) => "mlp.experts.*.up_proj",
            _ => return None,
        })
    }

    /// A stack of matrices, one for each expert.
    fn experts(&self, path: &Path, stored: &Stored, name: impl Fn(u64) -> String) -> Result<Vec<Logical>> {
        let (count, matrix) = match &stored.shape[..] {
            [count @ 1..=MAX_EXPERTS, rest @ ..] if rest.len() == 2 && !rest.contains(&0) => (*count, rest),
            other => {
                let what = format!("has shape {other:?}, where experts are stacked matrices");
                return Err(Error::corrupt(path, Some(&stored.name), what));
            }
        };
        let one = |expert| Logical {
            name: name(expert),
            shape: matrix.to_vec(),
            heads: None,
            offset_by_one: false,
            part: Some((expert, count)),
        };
        Ok((0..count).map(one).collect())
    }
}
