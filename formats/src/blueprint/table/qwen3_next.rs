//! Qwen3-Next and Qwen3.5.

use super::{BIASES, DEFAULTS, EXPERTS, QWEN3, ROPE};
use crate::blueprint::mixers::PLAIN;
use crate::blueprint::{
    Bias, Blueprint, Defaults, DeltaNames, ExpertLayers, Experts, LayerKinds, Mixers, NormKind, Rope,
    SharedExpert, SharedSize, Stacked, Windows,
};

/// Qwen3-Next: three of four layers are gated delta layers; attention is gated.
pub(super) const QWEN3_NEXT: Blueprint = Blueprint {
    name: "Qwen3-Next",
    model_types: &["qwen3_next"],
    defaults: Defaults { head_dim: Some(256), ..DEFAULTS },
    norm: NormKind::RmsPlusOne,
    biases: BIASES,
    experts: Some(Experts {
        count: &["num_experts", "num_local_experts"],
        normalise: Bias::Key("norm_topk_prob", true),
        shared: Some(SharedExpert {
            module: "shared_expert",
            size: SharedSize::Key("shared_expert_intermediate_size"),
            gate: Some("shared_expert_gate"),
        }),
        ..EXPERTS
    }),
    mixers: Mixers {
        gated: true,
        delta: Some(DeltaNames { module: "linear_attn", inputs: &["in_proj_qkvz", "in_proj_ba"] }),
        kinds: LayerKinds::DeltaBut(4),
        ..PLAIN
    },
    windows: Windows::Never,
    rope: Some(Rope { partial: Some(0.25), ..ROPE }),
    ..QWEN3
};

/// The text model of Qwen3.5.
pub(super) const QWEN3_5: Blueprint = Blueprint {
    name: "Qwen3.5",
    model_types: &["qwen3_5", "qwen3_5_text"],
    experts: None,
    mixers: Mixers {
        gated: true,
        delta: Some(DeltaNames {
            module: "linear_attn",
            inputs: &["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"],
        }),
        kinds: LayerKinds::DeltaBut(4),
        ..PLAIN
    },
    ..QWEN3_NEXT
};

/// The same with experts, in one tensor or apart.
pub(super) const QWEN3_5_MOE: Blueprint = Blueprint {
    name: "Qwen3.5 MoE",
    model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
    experts: Some(Experts {
        stacked: Some(Stacked {
            names: ["gate_up_proj", "down_proj"],
            transposed: false,
            interleaved: false,
            bias: false,
        }),
        normalise: Bias::Always,
        shared: Some(SharedExpert {
            module: "shared_expert",
            size: SharedSize::Key("shared_expert_intermediate_size"),
            gate: Some("shared_expert_gate"),
        }),
        layers: ExpertLayers::All,
        ..EXPERTS
    }),
    ..QWEN3_5
};
