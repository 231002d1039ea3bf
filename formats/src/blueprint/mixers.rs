//! What stands in the place of attention, or beside it.

/// Parts of attention that most architectures do without.
#[derive(Debug)]
pub struct Mixers {
    /// Whether queries, keys and values are made of small latent vectors (DeepSeek-V2, section 2.1), whose sizes the configuration says.
    pub latent: bool,
    /// Whether each head's query has a gate beside it, whose sigmoid multiplies what the head gives out.
    pub gated: bool,
    /// Scores of a token that is not there, one for each head: their tensor.
    pub sinks: Option<&'static str>,
    /// Whether queries are scaled by their position in layers that turn nothing: `attn_temperature_tuning`, `floor_scale`, `attn_scale`.
    pub temperature: bool,
    /// Layers that remember instead of attending, where there are some: `linear_attention` in `layer_types`.
    pub delta: Option<DeltaNames>,
    /// What layers are where `layer_types` does not say.
    pub kinds: LayerKinds,
}

/// Layers where `layer_types` does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKinds {
    /// As [`super::Windows`] says.
    Windows,
    /// One with a window, one without; the window where none is said.
    Alternating(usize),
    /// All remember but every `full_attention_interval`-th, or so many-th.
    DeltaBut(usize),
    /// Those that turn queries and keys see chunks of `attention_chunk_size` tokens; this where nothing is said.
    ChunkedTurned(usize),
}

/// Tensors of a gated delta layer (Yang et al., Gated Delta Networks).
#[derive(Debug)]
pub struct DeltaNames {
    /// The module.
    pub module: &'static str,
    /// What reads the residual stream: of each key head query, key, values and gates in one matrix, beta and a in another; or all queries, keys
    /// and values, all gates, beta, a.
    pub inputs: &'static [&'static str],
}

/// Attention and nothing else.
pub(super) const PLAIN: Mixers = Mixers {
    latent: false,
    gated: false,
    sinks: None,
    temperature: false,
    delta: None,
    kinds: LayerKinds::Windows,
};
