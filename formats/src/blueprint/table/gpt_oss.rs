//! gpt-oss.

use super::{DEFAULTS, EXPERTS, LLAMA, ROPE};
use crate::blueprint::mixers::PLAIN;
use crate::blueprint::{
    Bias, Biases, Blueprint, Clamp, Defaults, ExpertLayers, Experts, LayerKinds, Mixers, Rope, Scores,
    Stacked,
};

/// gpt-oss: attention sinks, windows in turn, experts in one tensor with a clamped function and biases.
pub(super) const GPT_OSS: Blueprint = Blueprint {
    name: "gpt-oss",
    model_types: &["gpt_oss"],
    defaults: Defaults { head_dim: Some(64), norm_eps: 1e-5, ..DEFAULTS },
    biases: Biases {
        qkv: Bias::Key("attention_bias", true),
        output: Bias::Key("attention_bias", true),
        mlp: Bias::Never,
    },
    experts: Some(Experts {
        stacked: Some(Stacked {
            names: ["gate_up_proj", "down_proj"],
            transposed: true,
            interleaved: true,
            bias: true,
        }),
        router: "router",
        router_bias: true,
        count: &["num_local_experts", "num_experts"],
        intermediate: "intermediate_size",
        scores: Scores::SoftmaxOfPicked,
        normalise: Bias::Never,
        clamp: Some(Clamp { alpha: ("swiglu_alpha", 1.702), limit: ("swiglu_limit", 7.0) }),
        layers: ExpertLayers::All,
        ..EXPERTS
    }),
    mixers: Mixers { sinks: Some("self_attn.sinks"), kinds: LayerKinds::Alternating(128), ..PLAIN },
    rope: Some(Rope { theta: 1.5e5, ..ROPE }),
    ..LLAMA
};
