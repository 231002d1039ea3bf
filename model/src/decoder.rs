//! The decoder: embedding, layers, head.
//!
//! ```text
//! ids -> embedding -> [ norm, attention, + | norm, MLP, + ] x layers -> norm -> head -> logits
//! ```

use std::ops::Range;
use std::sync::Arc;

use llmpress_formats::blueprint::{MlpNames, Names, Projected, QueryKeyNorm};
use llmpress_formats::{Blueprint, Checkpoint, Error, Result, Transform};
use llmpress_kernels::cpu::{HeadCodes, exp};

use crate::attention::{self, Attention, HeadNorms, Projections};
use crate::config::MlpConfig;
use crate::head;
use crate::linear::{Linear, Product, multiply_all};
use crate::mlp::{self, GateUp, Gated, Mlp};
use crate::norm::{Norm, normed};
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
    /// Embeddings of positions, where they are learned.
    pub(crate) positions: Option<Linear>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Norm,
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

/// A sub-layer with the norms of its input and of its output, as far as its family has them.
#[derive(Debug)]
pub(crate) struct SubLayerParts<T> {
    pub(crate) norm: Option<Norm>,
    pub(crate) body: T,
    pub(crate) post_norm: Option<Norm>,
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
        let blueprint = config.blueprint;
        let names = &blueprint.names;
        let (prefix, embedding_name) = embedding_name(c, names)?;
        let embedding_shape = &c.tensor(&embedding_name)?.shape;
        let vocab = config.vocab_size.or(embedding_shape.first().map(|&n| n as usize)).unwrap_or(0);
        let embedding = Linear::open(c, &embedding_name, vocab, config.hidden_size, None)?;
        let (head_name, warning) = head::find(c, config.tied, &embedding_name)?;
        // In memory once.
        let head = match c.tied().get(&head_name).unwrap_or(&head_name) == embedding.tensor() {
            true => embedding.shared(),
            false => Linear::open(c, &head_name, vocab, config.hidden_size, None)?,
        };
        let positions = match names.positions {
            Some(module) => {
                let count = config.max_positions.ok_or_else(|| {
                    let what = format!("config.json does not say {}", blueprint.keys.positions);
                    Error::corrupt(c.root(), None, what)
                })?;
                let name = format!("{prefix}{module}.weight");
                used.note(&name);
                Some(Linear::open(c, &name, count, config.hidden_size, None)?)
            }
            None => None,
        };
        let layers = (0..config.layers.len())
            .map(|layer| {
                let name = format!("{prefix}{}.{layer}.", names.layers);
                Loader { checkpoint: c, config: &config, used: &used, name }.layer(layer)
            })
            .collect::<Result<Vec<_>>>()?;
        let norm_name = format!("{prefix}{}", names.last_norm);
        let norm = Norm::open(c, &used, blueprint.norm, &norm_name, config.hidden_size)?;
        for name in [&embedding_name, &head_name] {
            used.note(name);
        }
        if warning.is_none() {
            // A head that repeats the embedding is not missed.
            head::NAMES.into_iter().filter(|_| config.tied == Some(true)).for_each(|name| used.note(name));
        }
        let (unused, warnings) = (used.others(c, &prefix), warning.into_iter().collect());
        let transforms = checkpoint.transforms().to_vec();
        let (none, online) = (Vec::new(), Online::default());
        let mut model = Self {
            config,
            embedding,
            positions,
            layers,
            norm,
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
        let tables = std::iter::once(&mut self.embedding).chain(&mut self.positions);
        for linear in tables.chain(layers) {
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

    /// The embeddings of tokens that begin a sequence: features x tokens.
    ///
    /// # Errors
    /// An id beyond the vocabulary; more tokens than there are learned positions.
    pub fn embed(&self, ids: &[u32]) -> Result<Panels> {
        self.embed_at(ids, 0)
    }

    /// The embeddings of tokens at positions `first ..`: features x tokens.
    ///
    /// # Errors
    /// Those of [`Self::embed`].
    pub fn embed_at(&self, ids: &[u32], first: usize) -> Result<Panels> {
        let mut out = Panels::zeros(self.config.hidden_size, ids.len());
        let mut row = vec![0.0; self.config.hidden_size];
        let mut position = vec![0.0; if self.positions.is_some() { self.config.hidden_size } else { 0 }];
        let scale = self.config.embedding_scale;
        for (token, &id) in ids.iter().enumerate() {
            if id as usize >= self.embedding.rows() {
                return Err(Error::Invalid(format!(
                    "token id {id} at {token} is beyond the vocabulary of {} of {}",
                    self.embedding.rows(),
                    self.checkpoint.root().display()
                )));
            }
            self.embedding.row(&self.checkpoint, id as usize, &mut row)?;
            let Some(positions) = &self.positions else {
                out.set_token(token, row.iter().map(|x| x * scale));
                continue;
            };
            if first + token >= positions.rows() {
                return Err(Error::Limit(format!(
                    "{} has learned {} positions, and a token stands at {}",
                    self.checkpoint.root().display(),
                    positions.rows(),
                    first + token
                )));
            }
            positions.row(&self.checkpoint, first + token, &mut position)?;
            out.set_token(token, row.iter().zip(&position).map(|(x, p)| x * scale + p));
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
        let mut h = self.embed_at(ids, cache.len())?;
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
            self.norm.apply(&residual, self.config.norm_eps, &mut out);
        } else {
            self.norm.apply(residual, self.config.norm_eps, &mut out);
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
        let (eps, parallel) = (self.config.norm_eps, self.config.blueprint.parallel);
        let (mut x, mut y) = (Panels::default(), Panels::default());
        // What both sub-layers read, where they read the same.
        let mut both = Panels::default();
        let (mut attention_space, mut mlp_space) =
            (attention::Workspace::default(), mlp::Workspace::default());
        for index in layers {
            let layer = &self.layers[index];
            if parallel {
                both.clone_from(h);
            }
            let site = SubLayer::Attention(index);
            observer.before(site, h);
            if let Some(attention) = layer.attention.as_ref().filter(|_| !skips.contains(&site)) {
                normed(attention.norm.as_ref(), h, eps, &mut x);
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
                self.add(h, &mut y, attention.post_norm.as_ref(), &mut x);
            }
            observer.after(site, h);
            let site = SubLayer::Mlp(index);
            observer.before(site, h);
            if let Some(mlp) = layer.mlp.as_ref().filter(|_| !skips.contains(&site)) {
                normed(mlp.norm.as_ref(), if parallel { &both } else { h }, eps, &mut x);
                mlp.body.forward(&self.checkpoint, &x, observer, &mut mlp_space, &mut y)?;
                self.add(h, &mut y, mlp.post_norm.as_ref(), &mut x);
            }
            observer.after(site, h);
        }
        Ok(())
    }

    /// Adds what a sub-layer gives out to the residual stream, normed and scaled as its family has it; `scratch` serves for that.
    pub(crate) fn add(&self, h: &mut Panels, y: &mut Panels, post_norm: Option<&Norm>, scratch: &mut Panels) {
        if let Some(norm) = post_norm {
            norm.apply(y, self.config.norm_eps, scratch);
            std::mem::swap(y, scratch);
        }
        let pairs = h.data_mut().iter_mut().zip(y.data());
        let scale = self.config.residual_scale;
        if scale == 1.0 {
            pairs.for_each(|(h, y)| *h += y);
        } else {
            pairs.for_each(|(h, y)| *h += scale * y);
        }
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

    /// Logits as the model scales and caps them.
    pub(crate) fn cap(&self, logits: &mut Panels) {
        let scale = self.config.logit_scale;
        if scale != 1.0 {
            logits.data_mut().iter_mut().for_each(|l| *l *= scale);
        }
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

/// The embedding's name tells the prefix of all others.
fn embedding_name(checkpoint: &Checkpoint, names: &Names) -> Result<(String, String)> {
    let of = |prefix: &str| format!("{prefix}{}.weight", names.embedding);
    for prefix in names.prefixes {
        if checkpoint.tensors().contains_key(&of(prefix)) {
            return Ok(((*prefix).to_owned(), of(prefix)));
        }
    }
    let first = names.prefixes.first().copied().unwrap_or_default();
    // The error names the nearest tensor there is.
    checkpoint.tensor(&of(first)).map(|_| (first.to_owned(), of(first)))
}

/// Finds the tensors of a layer, whose names start with `name`.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    used: &'a Used,
    name: String,
}

impl Loader<'_> {
    fn blueprint(&self) -> &'static Blueprint {
        self.config.blueprint
    }

    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear> {
        let name = |suffix: &str| format!("{}{module}.{suffix}", self.name);
        let (weight, bias) = (name("weight"), bias.then(|| name("bias")));
        for name in bias.iter().chain([&weight]) {
            self.used.note(name);
        }
        if self.blueprint().transposed {
            Linear::open_transposed(self.checkpoint, &weight, rows, cols, bias.as_deref())
        } else {
            Linear::open(self.checkpoint, &weight, rows, cols, bias.as_deref())
        }
    }

    fn norm(&self, module: &str, len: usize) -> Result<Norm> {
        let module = format!("{}{module}", self.name);
        Norm::open(self.checkpoint, self.used, self.blueprint().norm, &module, len)
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let (names, hidden) = (&self.blueprint().names, self.config.hidden_size);
        let norm = |module: Option<&str>| module.map(|module| self.norm(module, hidden)).transpose();
        let layer = &self.config.layers[index];
        let attention = match layer.no_attention {
            true => None,
            false => Some(SubLayerParts {
                norm: norm(names.attention_norm)?,
                body: self.attention(index)?,
                post_norm: norm(names.attention_post_norm)?,
            }),
        };
        let mlp = match layer.no_mlp {
            true => None,
            false => Some(SubLayerParts {
                norm: norm(names.mlp_norm)?,
                body: self.mlp(index)?,
                post_norm: norm(names.mlp_post_norm)?,
            }),
        };
        Ok(Layer { attention, mlp })
    }

    fn attention(&self, index: usize) -> Result<Attention> {
        let (c, names) = (self.config, &self.blueprint().names);
        let (q_rows, kv_rows) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let linear = |module: &str, rows| self.linear(module, rows, c.hidden_size, c.qkv_bias);
        let projections = match names.projections {
            Projected::Fused(module) => Projections::Fused(linear(module, q_rows + 2 * kv_rows)?),
            Projected::Separate([q, k, v]) => Projections::Separate(Box::new([
                linear(q, q_rows)?,
                linear(k, kv_rows)?,
                linear(v, kv_rows)?,
            ])),
        };
        let [q, k] = names.query_key_norms;
        let qk_norm = match c.qk_norm() {
            QueryKeyNorm::None => HeadNorms::None,
            QueryKeyNorm::Heads => {
                HeadNorms::Heads(self.norm(q, c.head_dim)?.weight, self.norm(k, c.head_dim)?.weight)
            }
            QueryKeyNorm::Whole => HeadNorms::Whole(self.norm(q, q_rows)?, self.norm(k, kv_rows)?),
        };
        Ok(Attention {
            projections,
            output: self.linear(names.output, c.hidden_size, q_rows, c.o_bias)?,
            qk_norm,
            window: c.layers[index].window,
            rope: c.layers[index].rope,
        })
    }

    fn mlp(&self, index: usize) -> Result<Mlp> {
        let (config, blueprint) = (self.config, self.blueprint());
        match config.layers[index].mlp {
            MlpConfig::Dense { intermediate } | MlpConfig::Plain { intermediate } => {
                Ok(Mlp::Dense(Box::new(self.dense(&blueprint.names.mlp, intermediate)?)))
            }
            MlpConfig::Experts { intermediate, count, top_k, normalise } => {
                let missing = || Error::Invalid(format!("{} models have no experts", blueprint.name));
                let names = blueprint.experts.as_ref().ok_or_else(missing)?;
                let one = |expert: usize| {
                    let [gate, up, down] =
                        names.names.map(|part| format!("{}.experts.{expert}.{part}", names.module));
                    self.gated([&gate, &up, &down], intermediate)
                };
                let experts = (0..count).map(one).collect::<Result<Vec<_>>>()?;
                let router = format!("{}.{}", names.module, names.router);
                let router = self.linear(&router, count, config.hidden_size, false)?;
                Ok(Mlp::Experts { router, experts, top_k, normalise })
            }
        }
    }

    fn dense(&self, names: &MlpNames, inner: usize) -> Result<Gated> {
        let (c, hidden) = (self.config, self.config.hidden_size);
        let (gate_up, down) = match *names {
            MlpNames::Gated([gate, up, down]) => return self.gated([gate, up, down], inner),
            MlpNames::Fused([gate_up, down]) => {
                (GateUp::Fused(self.linear(gate_up, 2 * inner, hidden, c.mlp_bias)?), down)
            }
            MlpNames::Plain([up, down]) => (GateUp::Alone(self.linear(up, inner, hidden, c.mlp_bias)?), down),
        };
        let down = self.linear(down, hidden, inner, c.mlp_bias)?;
        Ok(Gated { gate_up, down, activation: c.activation, turn: None })
    }

    fn gated(&self, [gate, up, down]: [&str; 3], inner: usize) -> Result<Gated> {
        let (c, hidden) = (self.config, self.config.hidden_size);
        let gate_up = GateUp::Separate([
            self.linear(gate, inner, hidden, c.mlp_bias)?,
            self.linear(up, inner, hidden, c.mlp_bias)?,
        ]);
        let down = self.linear(down, hidden, inner, c.mlp_bias)?;
        Ok(Gated { gate_up, down, activation: c.activation, turn: None })
    }
}
