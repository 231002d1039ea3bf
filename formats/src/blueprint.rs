//! What an architecture is made of, as data: the parts of its decoder, what its tensors are called, what its configuration leaves unsaid.
//!
//! ```text
//! model_type --> Blueprint --> tensor names, norms, MLP, positions, scales, caps     the same for every layer
//!                         '--> how windows, experts and rotary embeddings follow from the configuration, layer by layer
//! ```
//!
//! The decoder, pruning and readers of other tools' files go by these tables: the next architecture is an entry of `table`.

mod experts;
mod mixers;
mod special;
mod table;

use crate::{Config, Error, Result};

pub use experts::{Clamp, ExpertLayers, Experts, GroupRule, Scores, SharedExpert, SharedSize, Stacked};
pub use mixers::{DeltaNames, LayerKinds, Mixers};

/// An architecture.
#[derive(Debug)]
pub struct Blueprint {
    /// Its name.
    pub name: &'static str,
    /// What `model_type` says of it.
    pub model_types: &'static [&'static str],
    /// What its configuration calls sizes.
    pub keys: Keys,
    /// What holds where its configuration says nothing.
    pub defaults: Defaults,
    /// What its tensors are called.
    pub names: Names,
    /// What its norms compute.
    pub norm: NormKind,
    /// Whether attention and MLP of a layer read the same, and the sum of what they give out is added.
    pub parallel: bool,
    /// What of queries and keys is normed.
    pub query_key_norm: QueryKeyNorm,
    /// Which matrices have biases.
    pub biases: Biases,
    /// Whether matrices are stored as `[inputs, outputs]`.
    pub transposed: bool,
    /// Its experts, where it has them.
    pub experts: Option<Experts>,
    /// What its attention has besides, or layers have in its place.
    pub mixers: Mixers,
    /// Which layers see a window of the tokens before.
    pub windows: Windows,
    /// Its rotary embedding, where it has one.
    pub rope: Option<Rope>,
    /// What activations are multiplied by.
    pub scales: Scales,
    /// What is capped.
    pub caps: Caps,
    /// Switches of the configuration that must be as they are here: the key, the value, which holds too where the key is absent.
    pub fixed: &'static [(&'static str, bool)],
}

/// Keys of the configuration.
#[derive(Debug)]
pub struct Keys {
    /// Size of the residual stream.
    pub hidden: &'static str,
    /// Number of layers.
    pub layers: &'static str,
    /// Query heads.
    pub heads: &'static str,
    /// Inner size of a dense MLP.
    pub inner: &'static str,
    /// The longest sequence.
    pub positions: &'static str,
    /// What is added to the mean square in norms.
    pub norm_eps: &'static str,
    /// The function inside the MLP: the first one that is there counts.
    pub activation: &'static [&'static str],
}

/// What holds where nothing is said.
#[derive(Debug)]
pub struct Defaults {
    /// Query heads; none: they must be said.
    pub heads: Option<usize>,
    /// Key and value heads; none: as many as query heads.
    pub kv_heads: Option<usize>,
    /// Size of a head; none: the residual stream's, shared by the heads.
    pub head_dim: Option<usize>,
    /// Inner size of the MLP by that of the residual stream; none: it must be said.
    pub inner_times: Option<usize>,
    /// Added to the mean square in norms.
    pub norm_eps: f64,
    /// The function inside the MLP.
    pub activation: &'static str,
    /// Whether the head is the embedding; none: the tensors tell.
    pub tied: Option<bool>,
}

/// Names of tensors, without `.weight` and `.bias`; those of a layer follow `layers.N.`.
#[derive(Debug)]
pub struct Names {
    /// What all of the decoder's names may begin with: the first one that is there counts.
    pub prefixes: &'static [&'static str],
    /// The embedding.
    pub embedding: &'static str,
    /// Embeddings of positions, where they are learned.
    pub positions: Option<&'static str>,
    /// What comes before a layer's number.
    pub layers: &'static str,
    /// The norm before the head.
    pub last_norm: &'static str,
    /// The norm of what attention reads, where it is normed.
    pub attention_norm: Option<&'static str>,
    /// The norm of what attention gives out, where it is normed.
    pub attention_post_norm: Option<&'static str>,
    /// The norm of what the MLP reads, where it is normed; that of attention where both read the same.
    pub mlp_norm: Option<&'static str>,
    /// The norm of what the MLP gives out, where it is normed.
    pub mlp_post_norm: Option<&'static str>,
    /// Query, key and value.
    pub projections: Projected,
    /// From the heads' outputs.
    pub output: &'static str,
    /// Norms of query and key, where there are any.
    pub query_key_norms: [&'static str; 2],
    /// A dense MLP.
    pub mlp: MlpNames,
}

/// How query, key and value are stored.
#[derive(Debug)]
pub enum Projected {
    /// Apart.
    Separate([&'static str; 3]),
    /// In one matrix, one below the other.
    Fused(&'static str),
}

/// The matrices of a dense MLP.
#[derive(Debug)]
pub enum MlpNames {
    /// Gate, up and down.
    Gated([&'static str; 3]),
    /// Gate and up in one matrix, and down.
    Fused([&'static str; 2]),
    /// Up and down, with the function between them and no gate.
    Plain([&'static str; 2]),
}

/// What a norm computes of a token's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// By the root of the mean square, times weights.
    Rms,
    /// The same, times one more than the weights.
    RmsPlusOne,
    /// By the mean and the root of the mean square of what is left, times weights (Ba et al., layer normalization).
    Layer {
        /// Whether biases are added.
        bias: bool,
    },
}

/// What of queries and keys is normed, before they are turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// Nothing.
    None,
    /// Each head by itself.
    Heads,
    /// All heads of a token together.
    Whole,
    /// Each head by itself without weights after it is turned, in layers that turn, unless the configuration says no under this key.
    AfterTurn(&'static str),
}

/// Whether matrices have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None.
    Never,
    /// All.
    Always,
    /// As the configuration says under this key, or by default.
    Key(&'static str, bool),
}

/// Which matrices have biases.
#[derive(Debug)]
pub struct Biases {
    /// Query, key and value.
    pub qkv: Bias,
    /// The output of attention.
    pub output: Bias,
    /// A dense MLP.
    pub mlp: Bias,
}

/// Which layers see a window, where `layer_types` does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// None.
    Never,
    /// All, where there is a window.
    All,
    /// All, where there is a window and `use_sliding_window` says so.
    IfUsed,
    /// Those from `max_window_layers` on, where `use_sliding_window` says so.
    FromLayer,
    /// Those without a rotary embedding, where `use_sliding_window` says so.
    Unturned,
    /// All but every so many-th.
    Pattern {
        /// What says how many: the first one that is there counts.
        keys: &'static [&'static str],
        /// How many where none does.
        every: usize,
        /// The window where none is said.
        window: usize,
    },
}

/// A rotary embedding.
#[derive(Debug)]
pub struct Rope {
    /// The base where none is said.
    pub theta: f64,
    /// The part of a head's features that is turned where `partial_rotary_factor` does not say. None: all of them, and another part is
    /// refused.
    pub partial: Option<f64>,
    /// Whether neighbouring features are turned together, instead of those half a turned part away.
    pub neighbours: bool,
    /// Which layers turn.
    pub layers: Turned,
    /// Whether layers with a window have parameters of their own.
    pub sets: RopeSets,
    /// Whether `yarn` means LongRoPE.
    pub yarn_is_longrope: bool,
}

/// Which layers turn queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// All.
    All,
    /// Those with a window.
    Windowed,
    /// Those with a 1 in `no_rope_layers`; all but every `no_rope_layer_interval`-th (by default the number) where it is absent.
    Listed(usize),
}

/// Parameters of rotary embeddings by type of layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeSets {
    /// One for all.
    One,
    /// One for layers that see everything, which `rope_scaling` and `rope_theta` are for, and one for those with a window.
    ByWindow {
        /// What says the base of those with a window, beside their own parameters.
        key: Option<&'static str>,
        /// That base where nothing says it.
        theta: f64,
    },
}

/// A factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// One.
    One,
    /// The root of the residual stream's size.
    RootOfHidden,
    /// One by the root of a head's size.
    ByRootOfHead,
    /// One by the root of what stands under the key, or of this.
    ByRootOf(&'static str, f64),
    /// What stands under the key, or this.
    Times(&'static str, f64),
    /// One by what stands under the key, or by this.
    DividedBy(&'static str, f64),
}

/// What activations are multiplied by.
#[derive(Debug)]
pub struct Scales {
    /// The embedding.
    pub embedding: Scale,
    /// What sub-layers add to the residual stream.
    pub residual: Scale,
    /// Scores of attention.
    pub attention: Scale,
    /// Logits.
    pub logits: Scale,
}

/// Whether `x` becomes `c tanh(x / c)`, and what is said of c.
#[derive(Debug)]
pub struct Caps {
    /// Scores of attention, after they are scaled: the key, and what holds where it is absent.
    pub attention: Option<(&'static str, Option<f64>)>,
    /// Logits: the key, and what holds where it is absent.
    pub logits: Option<(&'static str, Option<f64>)>,
}

impl MlpNames {
    /// The last matrix.
    pub fn down(&self) -> &'static str {
        match self {
            Self::Gated([_, _, down]) | Self::Fused([_, down]) | Self::Plain([_, down]) => down,
        }
    }
}

impl Blueprint {
    /// That of a `model_type`.
    pub fn of(model_type: &str) -> Option<&'static Self> {
        Self::all().iter().find(|blueprint| blueprint.model_types.contains(&model_type))
    }

    /// That of a configuration.
    ///
    /// # Errors
    /// No `model_type`, or one that does not run here: by name, with what can be done nevertheless.
    pub fn of_config(config: &Config) -> Result<&'static Self> {
        let model_type = config
            .model_type()
            .ok_or_else(|| Error::corrupt(config.path(), None, "model_type is missing"))?;
        Self::of(model_type).ok_or_else(|| {
            let what = format!(
                "model_type {model_type:?} does not run here; these do: {}. What does not run it works: inspect, plan, diff, verify, \
                 restore, and convert without loss or by weights alone (rtn)",
                Self::model_types().collect::<Vec<_>>().join(", ")
            );
            Error::unsupported(config.path(), None, what)
        })
    }

    /// Every architecture that runs.
    pub fn all() -> &'static [Self] {
        table::ALL
    }

    /// Every `model_type` that runs.
    pub fn model_types() -> impl Iterator<Item = &'static str> {
        Self::all().iter().flat_map(|blueprint| blueprint.model_types.iter().copied())
    }

    /// Whether what sub-layers give out is normed before it is added.
    pub fn post_norms(&self) -> bool {
        self.names.attention_post_norm.is_some() || self.names.mlp_post_norm.is_some()
    }
}
