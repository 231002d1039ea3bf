//! The decoder: embedding, layers, head.
//!
//! ```text
//! ids -> embedding -> [ norm, attention, + | norm, MLP, + ] x layers -> norm -> head -> logits
//! ```

use std::ops::Range;
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Error, Result, Transform};
use llmpress_kernels::cpu::{HeadCodes, exp, rms_norm};
use rayon::prelude::*;

use crate::attention::{self, Attention, Projections};
use crate::config::{Family, MlpConfig};
use crate::head;
use crate::linear::{Linear, Product, multiply_all, vector};
use crate::mlp::{self, GateUp, Gated, Mlp};
use crate::online::{Online, turn};
use crate::rope::Rotation;
use crate::unused::Used;
use crate::{Cache, ModelConfig, Observer, Panels, Skips, SubLayer, Weights};

/// A model that runs from an open checkpoint, compressed or not.
#[derive(Debug)]
pub struct Model {
    pub(crate) checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
    pub(crate) embedding: Linear,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) norm_name: String,
    pub(crate) head: Linear,
    warnings: Vec<String>,
    unused: Vec<String>,
    pub(crate) transforms: Vec<Transform>,
    pub(crate) online: Online,
}

#[derive(Debug)]
pub(crate) struct Layer {
    /// None where it was pruned away.
    pub(crate) attention: Option<SubLayerParts<Attention>>,
    /// None where it was pruned away.
    pub(crate) mlp: Option<SubLayerParts<Mlp>>,
}

impl Layer {
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let attention = self.attention.iter().flat_map(|a| a.body.linears());
        attention.chain(self.mlp.iter().flat_map(|mlp| mlp.body.linears()))
    }

    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let attention = self.attention.iter_mut().flat_map(|a| a.body.linears_mut());
        attention.chain(self.mlp.iter_mut().flat_map(|mlp| mlp.body.linears_mut()))
    }
}

/// A sub-layer with the norm of its input and, in some families, of its output.
#[derive(Debug)]
pub(crate) struct SubLayerParts<T> {
    pub(crate) norm: Vec<f32>,
    pub(crate) norm_name: String,
    pub(crate) body: T,
    pub(crate) post_norm: Option<Vec<f32>>,
}

impl Model {
    /// Reads the configuration, finds every tensor and checks its shape and dtype. Reads norms and biases only.
    ///
    /// # Errors
    /// An architecture that does not run here; a missing or mis-shaped tensor: named.
    pub fn open(checkpoint: Arc<Checkpoint>) -> Result<Self> {
        let config = checkpoint.config().ok_or_else(|| {
            Error::corrupt(
                checkpoint.root().join("config.json"),
                None,
                "is missing: it says what the model is",
            )
        })?;
        let quantised = config.quantised_by().map(str::to_owned);
        let config = ModelConfig::parse(config)?;
        Self::build(checkpoint, config).map_err(|e| match quantised {
            Some(method) => Error::Invalid(format!(
                "{e}. The weights were quantised by {method} (quantization_config.quant_method), and llmpress runs \
                 plain ones and its own encodings: take the original checkpoint, or have {method} dequantise this one"
            )),
            None => e,
        })
    }

    fn build(checkpoint: Arc<Checkpoint>, config: ModelConfig) -> Result<Self> {
        let c = &*checkpoint;
        let used = Used::default();
        let embedding_name = embedding_name(c)?;
        let prefix = embedding_name.strip_suffix("embed_tokens.weight").unwrap_or_default();
        let embedding_shape = &c.tensor(&embedding_name)?.shape;
        let vocab = config.vocab_size.or(embedding_shape.first().map(|&n| n as usize)).unwrap_or(0);
        let embedding = Linear::open(c, &embedding_name, vocab, config.hidden_size, None)?;
        let (head_name, warning) = head::find(c, config.tied, &embedding_name)?;
        // In memory once.
        let head = match c.tied().get(&head_name).unwrap_or(&head_name) == embedding.tensor() {
            true => embedding.shared(),
            false => Linear::open(c, &head_name, vocab, config.hidden_size, None)?,
        };
        let layers = (0..config.layers.len())
            .map(|layer| {
                let name = format!("{prefix}layers.{layer}.");
                Loader { checkpoint: c, config: &config, used: &used, name }.layer(layer)
            })
            .collect::<Result<Vec<_>>>()?;
        let norm_name = format!("{prefix}norm.weight");
        let norm = load_norm(c, &config, &norm_name, config.hidden_size)?;
        for name in [&embedding_name, &head_name, &norm_name] {
            used.note(name);
        }
        if warning.is_none() {
            // A head that repeats the embedding is not missed.
            head::NAMES.into_iter().filter(|_| config.tied == Some(true)).for_each(|name| used.note(name));
        }
        let (unused, warnings) = (used.others(c, prefix), warning.into_iter().collect());
        let transforms = checkpoint.transforms().to_vec();
        let (none, online) = (Vec::new(), Online::default());
        let mut model = Self {
            config,
            embedding,
            layers,
            norm,
            norm_name,
            head,
            warnings,
            unused,
            transforms: none,
            online,
            checkpoint,
        };
        model.folds(&transforms)?;
        model.check_turned_norms(&transforms)?;
        model.go_online(transforms)?;
        Ok(model)
    }

    /// Brings the weights into memory in another form: what is stored compressed is decoded once, or multiplied from
    /// fixed12, or kept as DFloat11. The results stay the same to the bit.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn load(&mut self, weights: Weights) -> Result<()> {
        let checkpoint = self.checkpoint.clone();
        let tied = self.head.tensor() == self.embedding.tensor();
        // One after the other: each is read on all threads, and only one is in memory twice.
        let layers = self.layers.iter_mut().flat_map(Layer::linears_mut);
        for linear in std::iter::once(&mut self.embedding).chain(layers) {
            linear.load(&checkpoint, weights)?;
        }
        match tied {
            true => self.head.share(&self.embedding),
            false => self.head.load(&checkpoint, weights)?,
        }
        Ok(())
    }

    /// Bytes of weights that are decoded for every token, since they are stored so that no product runs from them.
    pub fn decoded_bytes(&self) -> u64 {
        let layers = self.layers.iter().flat_map(Layer::linears);
        layers.chain([&self.head]).map(Linear::decoded_bytes).sum()
    }

    /// What the user should know of the checkpoint, in sentences.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Stored tensors of the decoder that it does not use.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The sub-layers that it has, first to last.
    pub fn sub_layers(&self) -> Vec<SubLayer> {
        let of_layer = |(index, layer): (usize, &Layer)| {
            let attention = layer.attention.as_ref().map(|_| SubLayer::Attention(index));
            [attention, layer.mlp.as_ref().map(|_| SubLayer::Mlp(index))].into_iter().flatten()
        };
        self.layers.iter().enumerate().flat_map(of_layer).collect()
    }

    /// The checkpoint behind it.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.head.rows()
    }

    /// An empty cache for up to `capacity` tokens, which holds keys and values as the model's transformations say.
    pub fn cache(&self, capacity: usize) -> Cache {
        Cache::new(self.layers.len(), capacity, self.online.cache)
    }

    /// Bytes that keys and values of a token take on the processor, in all layers.
    pub fn cache_bytes_per_token(&self) -> usize {
        let (heads, d) = (self.config.kv_heads, self.config.head_dim);
        let head = self.online.cache.map_or(4 * d, HeadCodes::all_bytes);
        self.layers.iter().filter(|layer| layer.attention.is_some()).count() * 2 * heads * head
    }

    /// Bits in which the cache holds a key's or value's feature; none: as it is computed.
    pub fn cache_bits(&self) -> Option<u8> {
        self.online.cache.map(HeadCodes::bits)
    }

    /// The embeddings of tokens: features x tokens.
    ///
    /// # Errors
    /// An id beyond the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Panels> {
        let mut out = Panels::zeros(self.config.hidden_size, ids.len());
        let mut row = vec![0.0; self.config.hidden_size];
        let scale = self.config.embedding_scale();
        for (token, &id) in ids.iter().enumerate() {
            if id as usize >= self.embedding.rows() {
                return Err(Error::Invalid(format!(
                    "token id {id} at {token} is beyond the vocabulary of {} of {}",
                    self.embedding.rows(),
                    self.checkpoint.root().display()
                )));
            }
            self.embedding.row(&self.checkpoint, id as usize, &mut row)?;
            out.set_token(token, row.iter().map(|x| x * scale));
        }
        if let Some(by) = &self.online.residual {
            turn(by, &mut out, true);
        }
        Ok(out)
    }

    /// The residual stream after the last norm, for tokens that follow those in the cache, which takes them up:
    /// features x tokens. `skips` are left out; `observer` sees the activations.
    ///
    /// # Errors
    /// Those of [`Self::embed`]; more tokens than the cache can hold; weights that cannot be read.
    pub fn hidden(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        skips: &Skips,
        observer: &mut dyn Observer,
    ) -> Result<Panels> {
        let mut h = self.embed(ids)?;
        self.run_layers(0..self.layers.len(), &mut h, cache, skips, observer)?;
        cache.advance(ids.len());
        self.last_norm(&h)
    }

    /// The last norm: what the head gets of a residual stream.
    pub fn last_norm(&self, residual: &Panels) -> Result<Panels> {
        let mut out = Panels::default();
        if let Some(by) = &self.online.residual {
            let mut residual = residual.clone();
            turn(by, &mut residual, false);
            norm(&residual, &self.norm, self.config.rms_norm_eps, &mut out);
        } else {
            norm(residual, &self.norm, self.config.rms_norm_eps, &mut out);
        }
        Ok(out)
    }

    /// Runs some layers on a residual stream in place. The tokens' keys and values go into the cache, whose
    /// length stays: [`Self::hidden`] or [`Cache`]'s owner counts a token when all layers have seen it.
    ///
    /// # Errors
    /// More tokens than the cache can hold; weights that cannot be read.
    pub fn run_layers(
        &self,
        layers: Range<usize>,
        h: &mut Panels,
        cache: &mut Cache,
        skips: &Skips,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let needed = cache.len().saturating_add(h.tokens());
        if needed > cache.capacity() {
            return Err(Error::Limit(format!("{needed} tokens do not fit a cache of {}", cache.capacity())));
        }
        if h.tokens() == 0 {
            return Ok(());
        }
        let rotations: Vec<Rotation> = self
            .config
            .ropes
            .iter()
            .map(|rope| Rotation::new(rope, cache.len(), h.tokens(), cache.announced()))
            .collect();
        let eps = self.config.rms_norm_eps;
        let (mut x, mut y) = (Panels::default(), Panels::default());
        let (mut attention_space, mut mlp_space) =
            (attention::Workspace::default(), mlp::Workspace::default());
        for index in layers {
            let layer = &self.layers[index];
            let site = SubLayer::Attention(index);
            observer.before(site, h);
            if let Some(attention) = layer.attention.as_ref().filter(|_| !skips.contains(&site)) {
                norm(h, &attention.norm, eps, &mut x);
                attention.body.forward(
                    &self.checkpoint,
                    &self.config,
                    self.online.qkv_bits,
                    index,
                    &x,
                    &rotations,
                    cache,
                    observer,
                    &mut attention_space,
                    &mut y,
                )?;
                add(h, &mut y, attention.post_norm.as_deref(), eps, &mut x);
            }
            observer.after(site, h);
            let site = SubLayer::Mlp(index);
            observer.before(site, h);
            if let Some(mlp) = layer.mlp.as_ref().filter(|_| !skips.contains(&site)) {
                norm(h, &mlp.norm, eps, &mut x);
                mlp.body.forward(&self.checkpoint, &x, observer, &mut mlp_space, &mut y)?;
                add(h, &mut y, mlp.post_norm.as_deref(), eps, &mut x);
            }
            observer.after(site, h);
        }
        Ok(())
    }

    /// The logits of hidden states: vocabulary x tokens. For many tokens see [`crate::Engine::logit_runs`].
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn logits(&self, hidden: &Panels) -> Result<Panels> {
        let mut out = Panels::default();
        self.logit_run(hidden, 0..self.vocab_size(), &mut out)?;
        Ok(out)
    }

    /// The logits of a run of the vocabulary: run x tokens.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn logit_run(&self, hidden: &Panels, rows: Range<usize>, out: &mut Panels) -> Result<()> {
        let product = Product { linear: &self.head, rows, x: hidden, out };
        multiply_all(&self.checkpoint, &mut [product])?;
        self.cap(out);
        Ok(())
    }

    /// Logits as the model caps them.
    pub(crate) fn cap(&self, logits: &mut Panels) {
        if let Some(cap) = self.config.final_softcap {
            logits.data_mut().iter_mut().for_each(|l| *l = soft_cap(*l, cap));
        }
    }
}

/// `c tanh(x / c)`: logits as some models cap them.
pub fn soft_cap(x: f32, cap: f32) -> f32 {
    // tanh y = 1 - 2 / (e^2y + 1)
    cap * (1.0 - 2.0 / (exp(2.0 * x / cap) + 1.0))
}

/// `out = norm(x)`.
pub(crate) fn norm(x: &Panels, weight: &[f32], eps: f32, out: &mut Panels) {
    out.resize(x.features(), x.tokens());
    let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
    let one = |(panel, out): (usize, &mut [f32])| rms_norm(x.panel(panel), weight, eps, widths[panel], out);
    let panels: Vec<_> = out.panels_mut().enumerate().collect();
    if panels.len() == 1 {
        panels.into_iter().for_each(one);
    } else {
        panels.into_par_iter().for_each(one);
    }
}

/// `h += y`, or the norm of `y`, for which `scratch` serves.
pub(crate) fn add(h: &mut Panels, y: &mut Panels, post_norm: Option<&[f32]>, eps: f32, scratch: &mut Panels) {
    if let Some(weight) = post_norm {
        norm(y, weight, eps, scratch);
        std::mem::swap(y, scratch);
    }
    h.data_mut().iter_mut().zip(y.data()).for_each(|(h, y)| *h += y);
}

/// The embedding's name tells the prefix of all others.
fn embedding_name(checkpoint: &Checkpoint) -> Result<String> {
    for prefix in ["model.", "language_model.model.", "model.language_model.", ""] {
        let name = format!("{prefix}embed_tokens.weight");
        if checkpoint.tensors().contains_key(&name) {
            return Ok(name);
        }
    }
    // The error names the nearest tensor there is.
    checkpoint.tensor("model.embed_tokens.weight").map(|_| "model.embed_tokens.weight".to_owned())
}

/// A norm's weights, with the offset of its family.
fn load_norm(checkpoint: &Checkpoint, config: &ModelConfig, name: &str, len: usize) -> Result<Vec<f32>> {
    let mut weight = vector(checkpoint, name, len)?;
    if config.norm_offset() {
        weight.iter_mut().for_each(|w| *w += 1.0);
    }
    Ok(weight)
}

/// Finds the tensors of a layer, whose names start with `name`.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    used: &'a Used,
    name: String,
}

impl Loader<'_> {
    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear> {
        let name = |suffix: &str| format!("{}{module}.{suffix}", self.name);
        let (weight, bias) = (name("weight"), bias.then(|| name("bias")));
        for name in bias.iter().chain([&weight]) {
            self.used.note(name);
        }
        Linear::open(self.checkpoint, &weight, rows, cols, bias.as_deref())
    }

    fn norm(&self, module: &str, len: usize) -> Result<Vec<f32>> {
        let name = format!("{}{module}.weight", self.name);
        self.used.note(&name);
        load_norm(self.checkpoint, self.config, &name, len)
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let (config, hidden) = (self.config, self.config.hidden_size);
        let norm = |module| self.norm(module, hidden);
        let name = |module| format!("{}{module}.weight", self.name);
        let layer = &config.layers[index];
        let (attention_post, mlp_norm, mlp_post) = match config.post_norms() {
            true => (
                Some("post_attention_layernorm"),
                "pre_feedforward_layernorm",
                Some("post_feedforward_layernorm"),
            ),
            false => (None, "post_attention_layernorm", None),
        };
        let attention = match layer.no_attention {
            true => None,
            false => Some(SubLayerParts {
                norm: norm("input_layernorm")?,
                norm_name: name("input_layernorm"),
                body: self.attention(index)?,
                post_norm: attention_post.map(norm).transpose()?,
            }),
        };
        let mlp = match layer.no_mlp {
            true => None,
            false => Some(SubLayerParts {
                norm: norm(mlp_norm)?,
                norm_name: name(mlp_norm),
                body: self.mlp(index)?,
                post_norm: mlp_post.map(norm).transpose()?,
            }),
        };
        Ok(Layer { attention, mlp })
    }

    fn attention(&self, index: usize) -> Result<Attention> {
        let c = self.config;
        let (q_rows, kv_rows) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let linear =
            |module: &str, rows, bias| self.linear(&format!("self_attn.{module}"), rows, c.hidden_size, bias);
        let projections = if c.family == Family::Phi3 {
            Projections::Fused(linear("qkv_proj", q_rows + 2 * kv_rows, c.qkv_bias)?)
        } else {
            Projections::Separate(Box::new([
                linear("q_proj", q_rows, c.qkv_bias)?,
                linear("k_proj", kv_rows, c.qkv_bias)?,
                linear("v_proj", kv_rows, c.qkv_bias)?,
            ]))
        };
        let qk_norm = if c.qk_norm() {
            Some((self.norm("self_attn.q_norm", c.head_dim)?, self.norm("self_attn.k_norm", c.head_dim)?))
        } else {
            None
        };
        Ok(Attention {
            projections,
            output: self.linear("self_attn.o_proj", c.hidden_size, q_rows, c.o_bias)?,
            qk_norm,
            window: c.layers[index].window,
            rope: c.layers[index].rope,
        })
    }

    fn mlp(&self, index: usize) -> Result<Mlp> {
        let hidden = self.config.hidden_size;
        let mixtral = self.config.family == Family::Mixtral;
        match self.config.layers[index].mlp {
            MlpConfig::Dense { intermediate } => {
                let names = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"].map(str::to_owned);
                Ok(Mlp::Dense(Box::new(self.gated(&names, intermediate)?)))
            }
            MlpConfig::Experts { intermediate, count, top_k, normalise } => {
                let (module, parts) = if mixtral {
                    ("block_sparse_moe", ["w1", "w3", "w2"])
                } else {
                    ("mlp", ["gate_proj", "up_proj", "down_proj"])
                };
                let experts = (0..count)
                    .map(|e| {
                        self.gated(&parts.map(|part| format!("{module}.experts.{e}.{part}")), intermediate)
                    })
                    .collect::<Result<Vec<_>>>()?;
                let router = self.linear(&format!("{module}.gate"), count, hidden, false)?;
                Ok(Mlp::Experts { router, experts, top_k, normalise })
            }
        }
    }

    /// `names` are those of gate, up and down.
    fn gated(&self, names: &[String; 3], intermediate: usize) -> Result<Gated> {
        let (c, hidden) = (self.config, self.config.hidden_size);
        let [gate, up, down] = names;
        let gate_up = if c.family == Family::Phi3 {
            GateUp::Fused(self.linear("mlp.gate_up_proj", 2 * intermediate, hidden, false)?)
        } else {
            GateUp::Separate([
                self.linear(gate, intermediate, hidden, c.mlp_bias)?,
                self.linear(up, intermediate, hidden, c.mlp_bias)?,
            ])
        };
        let down = self.linear(down, hidden, intermediate, c.mlp_bias)?;
        Ok(Gated { gate_up, down, activation: c.activation, turn: None })
    }
}
