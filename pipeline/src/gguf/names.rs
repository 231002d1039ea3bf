//! The tensors of a GGUF file, and those of the checkpoint that each is made of.
//!
//! ```text
//! model.layers.3.self_attn.q_proj.weight         blk.3.attn_q.weight          rows of heads interleaved, where the architecture is Llama's
//! model.layers.3.mlp.experts.0, 1, ...           blk.3.ffn_gate_exps.weight   one on the other
//! ```
//!
//! Every tensor of the checkpoint must be in one of them: what the architecture does not have is refused by name.

use std::collections::BTreeSet;

use llmpress_formats::blueprint::QueryKeyNorm;
use llmpress_formats::{Checkpoint, Error as FormatError};
use llmpress_model::{MlpConfig, ModelConfig};

use super::family::Family;
use crate::Result;

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Placed {
    /// Its name there.
    pub(super) name: String,
    /// The tensors of the checkpoint that it is made of, one on the other.
    pub(super) parts: Vec<String>,
    /// Heads whose rows are interleaved: llama.cpp turns neighbours where transformers turns halves.
    pub(super) heads: Option<u64>,
    /// Whether one is added to every value.
    pub(super) offset_by_one: bool,
    /// Whether llama.cpp wants it in single precision, though it is a matrix.
    pub(super) precise: bool,
}

/// Buffers that some old checkpoints hold: they follow from the configuration.
const FOLLOWS: &str = "rotary_emb.inv_freq";

/// All tensors, in the order in which they are written.
///
/// # Errors
/// A tensor that is missing, or one that the architecture does not have; layers that lack a sub-layer.
pub(super) fn placed(checkpoint: &Checkpoint, config: &ModelConfig, family: Family) -> Result<Vec<Placed>> {
    let mut found =
        Found { checkpoint, config, family, left: checkpoint.tensors().keys().collect(), all: Vec::new() };
    found.matrix("model.embed_tokens.weight", "token_embd.weight")?;
    for (number, layer) in config.layers.iter().enumerate() {
        if layer.no_attention || layer.no_mlp {
            let what = if layer.no_attention { "attention" } else { "MLP" };
            return Err(found.refuse(
                None,
                format!("has no {what} in layer {number}, which GGUF cannot say: prune with --portable"),
            ));
        }
        found.layer(number, &layer.mlp)?;
    }
    found.norm("model.norm.weight", "output_norm.weight")?;
    if found.left.contains(&"lm_head.weight".to_owned()) {
        found.matrix("lm_head.weight", "output.weight")?;
    } else if config.tied == Some(false) && !checkpoint.tied().contains_key("lm_head.weight") {
        return Err(found.missing("lm_head.weight"));
    }
    let other = found.left.iter().find(|name| !name.ends_with(FOLLOWS));
    match other {
        None => Ok(found.all),
        Some(name) => Err(found.refuse(
            Some(name),
            format!(
                "is none of the tensors that GGUF has for {}: towers of images and adapters are files of their own there, \
                 which llama.cpp's converter makes",
                config.blueprint.name
            ),
        )),
    }
}

/// What was found of a checkpoint so far.
struct Found<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    family: Family,
    left: BTreeSet<&'a String>,
    all: Vec<Placed>,
}

impl Found<'_> {
    fn refuse(&self, tensor: Option<&str>, what: String) -> crate::Error {
        FormatError::unsupported(self.checkpoint.root(), tensor, what).into()
    }

    fn missing(&self, name: &str) -> crate::Error {
        let what = format!("is missing: {} needs it", self.config.blueprint.name);
        FormatError::corrupt(self.checkpoint.root(), Some(name), what).into()
    }

    fn put(&mut self, parts: Vec<String>, name: &str) -> Result<&mut Placed> {
        for part in &parts {
            if !self.left.remove(part) {
                return Err(self.missing(part));
            }
        }
        let at = self.all.len();
        self.all.push(Placed {
            name: name.to_owned(),
            parts,
            heads: None,
            offset_by_one: false,
            precise: false,
        });
        Ok(&mut self.all[at])
    }

    fn matrix(&mut self, from: &str, to: &str) -> Result<&mut Placed> {
        self.put(vec![from.to_owned()], to)
    }

    fn norm(&mut self, from: &str, to: &str) -> Result<()> {
        let offset = self.config.norm_offset();
        self.put(vec![from.to_owned()], to)?.offset_by_one = offset;
        Ok(())
    }

    /// A matrix, and its bias if there is one.
    fn linear(&mut self, from: &str, to: &str, heads: Option<u64>) -> Result<()> {
        self.matrix(&format!("{from}.weight"), &format!("{to}.weight"))?.heads = heads;
        let bias = format!("{from}.bias");
        if self.left.contains(&bias) {
            self.matrix(&bias, &format!("{to}.bias"))?.heads = heads;
        }
        Ok(())
    }

    fn layer(&mut self, number: usize, mlp: &MlpConfig) -> Result<()> {
        let family = self.family;
        let (from, to) = (
            |name: &str| format!("model.layers.{number}.{name}"),
            |name: &str| format!("blk.{number}.{name}"),
        );
        let mut norms = vec![("input_layernorm", "attn_norm")];
        if self.config.qk_norm() != QueryKeyNorm::None {
            norms.extend([("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")]);
        }
        if self.config.post_norms() {
            norms.extend([
                ("post_attention_layernorm", "post_attention_norm"),
                ("pre_feedforward_layernorm", "ffn_norm"),
                ("post_feedforward_layernorm", "post_ffw_norm"),
            ]);
        } else {
            norms.push(("post_attention_layernorm", "ffn_norm"));
        }
        for (norm, name) in norms {
            self.norm(&from(&format!("{norm}.weight")), &to(&format!("{name}.weight")))?;
        }
        let heads = |count: usize| family.interleaves().then_some(count as u64);
        if family == Family::Phi3 {
            self.linear(&from("self_attn.qkv_proj"), &to("attn_qkv"), None)?;
            self.linear(&from("mlp.gate_up_proj"), &to("ffn_up"), None)?;
        } else {
            let (q, k) = (heads(self.config.heads), heads(self.config.kv_heads));
            for (name, stem, heads) in
                [("q_proj", "attn_q", q), ("k_proj", "attn_k", k), ("v_proj", "attn_v", None)]
            {
                self.linear(&from(&format!("self_attn.{name}")), &to(stem), heads)?;
            }
        }
        self.linear(&from("self_attn.o_proj"), &to("attn_output"), None)?;
        match *mlp {
            MlpConfig::Dense { .. } if family == Family::Phi3 => self.linear(&from("mlp.down_proj"), &to("ffn_down"), None),
            MlpConfig::Dense { .. } if family == Family::Qwen3Moe => Err(self.refuse(
                None,
                format!("has no experts in layer {number}, where the architecture qwen3moe of llama.cpp has them in all"),
            )),
            MlpConfig::Dense { .. } => ["gate", "up", "down"]
                .into_iter()
                .try_for_each(|name| self.linear(&from(&format!("mlp.{name}_proj")), &to(&format!("ffn_{name}")), None)),
            MlpConfig::Plain { .. } => {
                Err(self.refuse(None, format!("has an MLP without a gate in layer {number}, which GGUF lacks here")))
            }
            MlpConfig::Experts { count, .. } => {
                let (module, names) = match family {
                    Family::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
                    _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
                };
                let router = from(&format!("{module}.gate.weight"));
                self.matrix(&router, &to("ffn_gate_inp.weight"))?.precise = true;
                for (name, stem) in names.into_iter().zip(["gate", "up", "down"]) {
                    let parts =
                        (0..count).map(|expert| from(&format!("{module}.experts.{expert}.{name}.weight"))).collect();
                    self.put(parts, &to(&format!("ffn_{stem}_exps.weight")))?;
                }
                Ok(())
            }
        }
    }
}
