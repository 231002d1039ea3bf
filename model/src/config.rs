//! What a decoder is, read from `config.json` as transformers 4 and 5 write it.
//!
//! ```text
//! model_type --> blueprint --> sizes, norms, biases          the same for all layers
//!                        '--> window, rotary embedding, MLP  layer by layer
//! ```

use llmpress_formats::blueprint::{Bias, Experts, MlpNames, NormKind, QueryKeyNorm, Scale, Turned, Windows};
use llmpress_formats::{Blueprint, Config, Error, Removal, Result};
use serde_json::Value;

use crate::rope::RopeConfig;

/// Most layers, heads, experts and the like that a configuration may ask for.
const MAX_COUNT: usize = 1 << 16;
/// Largest size of a dimension.
const MAX_SIZE: usize = 1 << 30;

/// The function inside an MLP.
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
    /// One without a gate: up, the function, down.
    Plain {
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
    pub blueprint: &'static Blueprint,
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
    pub norm_eps: f32,
    /// Inside the MLP.
    pub activation: Activation,
    /// Biases on query, key and value.
    pub qkv_bias: bool,
    /// A bias on the attention's output.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// The embedding is multiplied by this.
    pub embedding_scale: f32,
    /// What sub-layers give out is multiplied by this before it is added.
    pub residual_scale: f32,
    /// Scores are multiplied by this.
    pub attention_scale: f32,
    /// Scores `s` become `c tanh(s / c)`.
    pub attention_softcap: Option<f32>,
    /// Logits are multiplied by this.
    pub logit_scale: f32,
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
        let blueprint = Blueprint::of_config(config)?;
        let (keys, defaults) = (&blueprint.keys, &blueprint.defaults);
        for (key, expected) in blueprint.fixed {
            if f.flag(key)?.is_some_and(|found| found != *expected) {
                return Err(f.unsupported(format!("{key} {}; only {expected} runs here", !expected)));
            }
        }
        let hidden_size = f.size(keys.hidden)?.ok_or_else(|| f.missing(keys.hidden))?;
        let count = f.count(keys.layers)?.ok_or_else(|| f.missing(keys.layers))?;
        let heads = f.count(keys.heads)?.or(defaults.heads).ok_or_else(|| f.missing(keys.heads))?;
        let kv_heads = f.count("num_key_value_heads")?.or(defaults.kv_heads).unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(f.corrupt(format!(
                "{} {heads} is no multiple of num_key_value_heads {kv_heads}",
                keys.heads
            )));
        }
        let head_dim = match f.size("head_dim")?.or(defaults.head_dim) {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(f.corrupt(format!(
                    "{} {hidden_size} is no multiple of {} {heads}",
                    keys.hidden, keys.heads
                )));
            }
        };
        let intermediate =
            f.size(keys.inner)?.or(defaults.inner_times.map(|times| times.saturating_mul(hidden_size)));
        let scale = |scale: Scale| f.scale(scale, hidden_size, head_dim);
        let cap = |cap: Option<(&str, Option<f64>)>| match cap {
            None => Ok(None),
            Some((key, default)) => Ok::<_, Error>(f.number_or(key, default)?.map(|c| c as f32)),
        };
        let mut ropes = RopeConfig::of_model(config, blueprint, head_dim)?;
        let windows = windows(&f, blueprint, count)?;
        let turned = turned(&f, blueprint, &windows)?;
        // What layers that turn nothing use.
        let still = ropes.len();
        if turned.contains(&false) {
            ropes.push(RopeConfig::none());
        }
        let by_window = still > 1;
        let removed = Removal::of_config(config, count)?;
        let layers = (0..count)
            .map(|layer| {
                let experts = blueprint.experts.as_ref();
                let mlp = match experts.map(|experts| expert_mlp(&f, experts, layer)).transpose()?.flatten() {
                    Some(mlp) => mlp,
                    None => {
                        let intermediate = intermediate.ok_or_else(|| f.missing(keys.inner))?;
                        match blueprint.names.mlp {
                            MlpNames::Gated(_) | MlpNames::Fused(_) => MlpConfig::Dense { intermediate },
                            MlpNames::Plain(_) => MlpConfig::Plain { intermediate },
                        }
                    }
                };
                let window = windows[layer];
                let rope = match turned[layer] {
                    true => usize::from(by_window && window.is_some()),
                    false => still,
                };
                let (no_attention, no_mlp) =
                    (removed.attention.contains(&layer), removed.mlp.contains(&layer));
                Ok(LayerConfig { window, rope, mlp, no_attention, no_mlp })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            blueprint,
            hidden_size,
            heads,
            kv_heads,
            head_dim,
            vocab_size: f.size("vocab_size")?,
            max_positions: config
                .get(keys.positions)
                .and_then(Value::as_u64)
                .and_then(|n| usize::try_from(n).ok()),
            norm_eps: f.number(keys.norm_eps)?.unwrap_or(defaults.norm_eps) as f32,
            activation: activation(&f, blueprint)?,
            qkv_bias: f.bias(blueprint.biases.qkv)?,
            o_bias: f.bias(blueprint.biases.output)?,
            mlp_bias: f.bias(blueprint.biases.mlp)?,
            embedding_scale: scale(blueprint.scales.embedding)?,
            residual_scale: scale(blueprint.scales.residual)?,
            attention_scale: scale(blueprint.scales.attention)?,
            attention_softcap: cap(blueprint.caps.attention)?,
            logit_scale: scale(blueprint.scales.logits)?,
            final_softcap: cap(blueprint.caps.logits)?,
            tied: config.tie_word_embeddings().or(defaults.tied),
            layers,
            ropes,
        })
    }

    /// Whether norms multiply by `1 + weight`.
    pub fn norm_offset(&self) -> bool {
        self.blueprint.norm == NormKind::RmsPlusOne
    }

    /// Whether the outputs of attention and MLP are normed too.
    pub fn post_norms(&self) -> bool {
        self.blueprint.post_norms()
    }

    /// What of queries and keys is normed.
    pub fn qk_norm(&self) -> QueryKeyNorm {
        self.blueprint.query_key_norm
    }
}

fn activation(f: &Fields<'_>, blueprint: &Blueprint) -> Result<Activation> {
    let key = blueprint.keys.activation.iter().copied().find(|key| f.config.get(key).is_some());
    let said = key.and_then(|key| f.config.get(key)).and_then(Value::as_str);
    match said.unwrap_or(blueprint.defaults.activation) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        other => Err(f.unsupported(format!(
            "{} {other:?}; silu, gelu_pytorch_tanh and gelu_new run here",
            key.unwrap_or_default()
        ))),
    }
}

/// The window of each layer.
fn windows(f: &Fields<'_>, blueprint: &Blueprint, count: usize) -> Result<Vec<Option<usize>>> {
    let window = f.size("sliding_window")?;
    if let Some(types) = f.config.get("layer_types").filter(|v| !v.is_null()) {
        let types = types.as_array().filter(|t| t.len() == count).ok_or_else(|| {
            f.corrupt(format!("layer_types must be a list of {count} names, one for each layer"))
        })?;
        let window = match blueprint.windows {
            Windows::Pattern { window: default, .. } => window.or(Some(default)),
            _ => window,
        };
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
    Ok(match blueprint.windows {
        Windows::Never => vec![None; count],
        Windows::All => vec![window; count],
        Windows::IfUsed => vec![window.filter(|_| used); count],
        Windows::FromLayer => {
            let first = f.index("max_window_layers")?.unwrap_or(28);
            (0..count).map(|layer| window.filter(|_| used && layer >= first)).collect()
        }
        Windows::Unturned => {
            let turned = turned(f, blueprint, &vec![None; count])?;
            turned.into_iter().map(|turned| window.filter(|_| used && !turned)).collect()
        }
        Windows::Pattern { keys, every, window: default } => {
            let mut pattern = None;
            for key in keys {
                pattern = pattern.or(f.count(key)?);
            }
            let (pattern, window) = (pattern.unwrap_or(every), window.unwrap_or(default));
            (0..count).map(|layer| ((layer + 1) % pattern != 0).then_some(window)).collect()
        }
    })
}

/// Whether each layer turns its queries and keys.
fn turned(f: &Fields<'_>, blueprint: &Blueprint, windows: &[Option<usize>]) -> Result<Vec<bool>> {
    let count = windows.len();
    let Some(rope) = &blueprint.rope else { return Ok(vec![false; count]) };
    let interval = match rope.layers {
        Turned::All => return Ok(vec![true; count]),
        Turned::Windowed => return Ok(windows.iter().map(Option::is_some).collect()),
        Turned::Listed(interval) => f.count("no_rope_layer_interval")?.unwrap_or(interval),
    };
    let Some(list) = f.config.get("no_rope_layers").filter(|v| !v.is_null()) else {
        return Ok((0..count).map(|layer| (layer + 1) % interval != 0).collect());
    };
    let wrong = || f.corrupt(format!("no_rope_layers must be a list of 0 or 1 for each of {count} layers"));
    let list = list.as_array().filter(|list| list.len() >= count).ok_or_else(wrong)?;
    let one = |v: &Value| v.as_u64().filter(|n| *n <= 1).map(|n| n == 1).or(v.as_bool()).ok_or_else(wrong);
    list.iter().take(count).map(one).collect()
}

/// The experts of a layer, if it has them.
fn expert_mlp(f: &Fields<'_>, experts: &Experts, layer: usize) -> Result<Option<MlpConfig>> {
    if experts.sparse_layers {
        let step = f.count("decoder_sparse_step")?.unwrap_or(1);
        let dense = f.config.get("mlp_only_layers").and_then(Value::as_array);
        let dense = dense.is_some_and(|l| l.iter().any(|v| v.as_u64() == Some(layer as u64)));
        if dense || !(layer + 1).is_multiple_of(step) {
            return Ok(None);
        }
    }
    let normalise = f.bias(experts.normalise)?;
    let key = experts.count.iter().copied().find(|key| f.config.get(key).is_some());
    let key = key.or(experts.count.last().copied()).unwrap_or_default();
    let count = f.count(key)?.ok_or_else(|| f.missing(key))?;
    let top_k = f.count("num_experts_per_tok")?.ok_or_else(|| f.missing("num_experts_per_tok"))?;
    if top_k > count {
        return Err(f.corrupt(format!("num_experts_per_tok {top_k} exceeds {key} {count}")));
    }
    let intermediate = f.size(experts.intermediate)?.ok_or_else(|| f.missing(experts.intermediate))?;
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

    /// A number, or `default` where nothing is said; none where it is said that there is none.
    fn number_or(&self, key: &str, default: Option<f64>) -> Result<Option<f64>> {
        if self.config.get(key).is_some() { self.number(key) } else { Ok(default) }
    }

    fn bias(&self, bias: Bias) -> Result<bool> {
        match bias {
            Bias::Never => Ok(false),
            Bias::Always => Ok(true),
            Bias::Key(key, default) => Ok(self.flag(key)?.unwrap_or(default)),
        }
    }

    fn scale(&self, scale: Scale, hidden: usize, head_dim: usize) -> Result<f32> {
        let said = |key, default| Ok::<_, Error>(self.number(key)?.unwrap_or(default));
        Ok(match scale {
            Scale::One => 1.0,
            Scale::RootOfHidden => (hidden as f64).sqrt(),
            Scale::ByRootOfHead => (head_dim as f64).powf(-0.5),
            Scale::ByRootOf(key, default) => said(key, default)?.powf(-0.5),
            Scale::Times(key, default) => said(key, default)?,
            Scale::DividedBy(key, default) => 1.0 / said(key, default)?,
        } as f32)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.config.get(key).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => Err(self.corrupt(format!("{key} is {value}; it must be true or false"))),
        }
    }
}
