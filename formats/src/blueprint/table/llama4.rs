//! Llama 4.

use super::{BIASES, DEFAULTS, EXPERTS, KEYS, LLAMA, NAMES, ROPE};
use crate::blueprint::mixers::PLAIN;
use crate::blueprint::{
    Bias, Blueprint, Defaults, ExpertLayers, Experts, Keys, LayerKinds, Mixers, MlpNames, Names,
    QueryKeyNorm, Rope, Scores, SharedExpert, SharedSize, Stacked, Turned,
};

/// The text model of Llama 4: chunks, layers that turn nothing, experts in one tensor beside a shared one.
pub(super) const LLAMA4: Blueprint = Blueprint {
    name: "Llama 4",
    model_types: &["llama4", "llama4_text"],
    keys: Keys { inner: "intermediate_size_mlp", ..KEYS },
    defaults: Defaults { head_dim: Some(128), norm_eps: 1e-5, ..DEFAULTS },
    names: Names {
        mlp: MlpNames::Gated(["feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"]),
        ..NAMES
    },
    query_key_norm: QueryKeyNorm::AfterTurn("use_qk_norm"),
    biases: BIASES,
    experts: Some(Experts {
        module: "feed_forward",
        stacked: Some(Stacked {
            names: ["gate_up_proj", "down_proj"],
            transposed: true,
            interleaved: false,
            bias: false,
        }),
        router: "router",
        count: &["num_local_experts"],
        intermediate: "intermediate_size",
        scores: Scores::Sigmoid,
        normalise: Bias::Never,
        weighs_inputs: true,
        shared: Some(SharedExpert { module: "shared_expert", size: SharedSize::Same, gate: None }),
        layers: ExpertLayers::Listed,
        ..EXPERTS
    }),
    mixers: Mixers { temperature: true, kinds: LayerKinds::ChunkedTurned(8192), ..PLAIN },
    rope: Some(Rope { theta: 5e5, neighbours: true, layers: Turned::Listed(4), ..ROPE }),
    ..LLAMA
};
