//! Checkpoints with random weights, to check and measure on where no real one is at hand.
//!
//! ```text
//! weight i of tensor t = Q(20 random bits) * deviation      Q: the normal distribution's quantiles, in BF16
//! ```
//!
//! The same bytes everywhere, for any number of threads: a weight depends on its place alone.

mod normal;
mod own_text;
mod words;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use llmpress_formats::{CONFIG_FILE, Dtype, Error, RenderEntry, Result, render, write_atomic};
use rayon::prelude::*;
use serde_json::json;

use normal::{Quantiles, fill};
pub use words::random_text;

const SHARD: &str = "model.safetensors";
/// 1 in BF16.
const ONE: u16 = 0x3f80;
/// Weights that a thread makes and writes at a time.
const PIECE: usize = 1 << 20;

/// A model to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RandomModel {
    /// Four layers, heads that share keys, a tokenizer of single characters, and a text that it drew itself: 6 MB. Its weights
    /// are scaled so that each part moves the logits, which are far from uniform, and no other model predicts its text
    /// as well: a wrong part shows in the perplexity.
    Small,
    /// The matrices of Llama 3 8B, without a tokenizer. N(0, 0.02), as models begin.
    Llama3_8b {
        /// Layers; the real one has 32.
        layers: usize,
    },
}

/// What a tensor holds.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Ones,
    /// A normal distribution with this deviation.
    Normal(f32),
}

struct Planned {
    name: String,
    shape: Vec<u64>,
    fill: Fill,
}

/// Sizes of a llama.
struct Sizes {
    hidden: u64,
    inner: u64,
    layers: usize,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    vocab: u64,
    rope_theta: f64,
    positions: u64,
    /// Deviations of the embedding; of queries and keys, of other matrices and of the head by the root of their columns.
    deviations: Deviations,
}

#[derive(Clone, Copy)]
enum Deviations {
    All(f32),
    Scaled { embedding: f32, query_key: f32, other: f32, head: f32 },
}

impl RandomModel {
    fn sizes(self) -> Sizes {
        match self {
            Self::Small => Sizes {
                hidden: 256,
                inner: 768,
                layers: 4,
                heads: 4,
                kv_heads: 2,
                head_dim: 64,
                vocab: own_text::CHARACTERS as u64,
                rope_theta: 10_000.0,
                positions: 2048,
                deviations: Deviations::Scaled { embedding: 1.0, query_key: 1.5, other: 1.0, head: 2.5 },
            },
            Self::Llama3_8b { layers } => Sizes {
                hidden: 4096,
                inner: 14336,
                layers,
                heads: 32,
                kv_heads: 8,
                head_dim: 128,
                vocab: 128_256,
                rope_theta: 500_000.0,
                positions: 8192,
                deviations: Deviations::All(0.02),
            },
        }
    }

    /// Bytes of its tensors.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.sizes().tensors().iter().map(|t| 2 * t.shape.iter().product::<u64>()).sum()
    }

    /// Its layers.
    #[must_use]
    pub fn layers(self) -> usize {
        self.sizes().layers
    }

    /// Writes it into a directory, as one shard, with a bounded piece in memory for each thread. It is not synced: it is
    /// made to be read at once and thrown away.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn write(self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, "create", e))?;
        let sizes = self.sizes();
        let tensors = sizes.tensors();
        let mut end = 0;
        let entries: Vec<RenderEntry> = tensors
            .iter()
            .map(|t| {
                let begin = end;
                end += 2 * t.shape.iter().product::<u64>();
                RenderEntry { name: t.name.clone(), dtype: Dtype::BF16, shape: t.shape.clone(), begin, end }
            })
            .collect();
        let header = render(&entries, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]), None)?;
        let path = dir.join(SHARD);
        let file = File::create(&path).map_err(|e| Error::io(&path, "create", e))?;
        let write =
            |bytes: &[u8], at: u64| file.write_all_at(bytes, at).map_err(|e| Error::io(&path, "write", e));
        write(&header, 0)?;
        let mut quantiles: Option<(f32, Quantiles)> = None;
        for (index, (tensor, entry)) in tensors.iter().zip(&entries).enumerate() {
            let start = header.len() as u64 + entry.begin;
            let count = ((entry.end - entry.begin) / 2) as usize;
            let Fill::Normal(deviation) = tensor.fill else {
                write(bytemuck::cast_slice(&vec![ONE; count]), start)?;
                continue;
            };
            let table = match &mut quantiles {
                Some((of, table)) if *of == deviation => table,
                other => &mut other.insert((deviation, Quantiles::new(deviation))).1,
            };
            (0..count.div_ceil(PIECE)).into_par_iter().try_for_each_init(Vec::new, |piece, number| {
                let first = number * PIECE;
                piece.resize(PIECE.min(count - first), 0u16);
                fill(table, index as u64, first as u64, piece);
                write(bytemuck::cast_slice(piece), start + 2 * first as u64)
            })?;
        }
        // A directory without it is no checkpoint.
        let config = serde_json::to_vec_pretty(&sizes.config()).map_err(|e| Error::Invalid(e.to_string()))?;
        write_atomic(&dir.join(CONFIG_FILE), &config)?;
        if self == Self::Small { own_text::write(dir) } else { Ok(()) }
    }
}

impl Sizes {
    fn tensors(&self) -> Vec<Planned> {
        let normal = |name: String, rows: u64, cols: u64, deviation: f32| Planned {
            name,
            shape: vec![rows, cols],
            fill: Fill::Normal(deviation),
        };
        let ones = |name: String| Planned { name, shape: vec![self.hidden], fill: Fill::Ones };
        // A deviation for the root of the columns: sums keep the size of what is summed.
        let scaled = |factor: f32, cols: u64| factor / (cols as f32).sqrt();
        let (embedding, query_key, other, head): (f32, _, _, f32) = match self.deviations {
            Deviations::All(d) => (d, (d, d), (d, d), d),
            Deviations::Scaled { embedding, query_key, other, head } => {
                let of_hidden = scaled(query_key, self.hidden);
                let other = (scaled(other, self.hidden), scaled(other, self.inner));
                (embedding, (of_hidden, of_hidden), other, scaled(head, self.hidden))
            }
        };
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors =
            vec![normal("model.embed_tokens.weight".to_owned(), self.vocab, self.hidden, embedding)];
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            tensors.extend([
                ones(name("input_layernorm")),
                normal(name("self_attn.q_proj"), q, self.hidden, query_key.0),
                normal(name("self_attn.k_proj"), kv, self.hidden, query_key.1),
                normal(name("self_attn.v_proj"), kv, self.hidden, other.0),
                normal(name("self_attn.o_proj"), self.hidden, q, other.0),
                ones(name("post_attention_layernorm")),
                normal(name("mlp.gate_proj"), self.inner, self.hidden, other.0),
                normal(name("mlp.up_proj"), self.inner, self.hidden, other.0),
                normal(name("mlp.down_proj"), self.hidden, self.inner, other.1),
            ]);
        }
        tensors.push(ones("model.norm.weight".to_owned()));
        tensors.push(normal("lm_head.weight".to_owned(), self.vocab, self.hidden, head));
        tensors
    }

    fn config(&self) -> serde_json::Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
        })
    }
}
