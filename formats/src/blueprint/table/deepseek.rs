//! DeepSeek-V2 and V3.

use super::{BIASES, EXPERTS, LLAMA, ROPE};
use crate::blueprint::mixers::PLAIN;
use crate::blueprint::{
    Bias, Biases, Blueprint, ExpertLayers, Experts, GroupRule, Mixers, Rope, Scores, SharedExpert, SharedSize,
};

/// DeepSeek-V3 and models like it: latent attention, experts picked by groups with a correction, shared ones.
pub(super) const DEEPSEEK_V3: Blueprint = Blueprint {
    name: "DeepSeek-V3",
    model_types: &["deepseek_v3"],
    biases: BIASES,
    experts: Some(DEEPSEEK_EXPERTS),
    mixers: Mixers { latent: true, ..PLAIN },
    rope: Some(Rope { neighbours: true, ..ROPE }),
    ..LLAMA
};

const DEEPSEEK_EXPERTS: Experts = Experts {
    correction: Some("gate.e_score_correction_bias"),
    count: &["n_routed_experts", "num_local_experts"],
    scores: Scores::Sigmoid,
    groups: Some(GroupRule { best: 2, only: None }),
    normalise: Bias::Key("norm_topk_prob", true),
    scale: Some(("routed_scaling_factor", 2.5)),
    shared: Some(SharedExpert {
        module: "shared_experts",
        size: SharedSize::Times("n_shared_experts", 1),
        gate: None,
    }),
    layers: ExpertLayers::From(3),
    ..EXPERTS
};

/// DeepSeek-V2: the same with a softmax.
pub(super) const DEEPSEEK_V2: Blueprint = Blueprint {
    name: "DeepSeek-V2",
    model_types: &["deepseek_v2"],
    biases: Biases { mlp: Bias::Key("mlp_bias", false), ..BIASES },
    experts: Some(Experts {
        correction: None,
        count: &["n_routed_experts", "num_experts"],
        scores: Scores::Softmax,
        groups: Some(GroupRule { best: 1, only: Some(("topk_method", "group_limited_greedy")) }),
        normalise: Bias::Never,
        scale: Some(("routed_scaling_factor", 1.0)),
        shared: Some(SharedExpert {
            module: "shared_experts",
            size: SharedSize::Times("n_shared_experts", 2),
            gate: None,
        }),
        layers: ExpertLayers::From(0),
        ..DEEPSEEK_EXPERTS
    }),
    ..DEEPSEEK_V3
};
