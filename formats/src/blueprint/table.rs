//! The architectures that run. What an entry does not say is as Llama has it.

use super::{
    Bias, Biases, Blueprint, Caps, Defaults, Experts, Keys, MlpNames, Names, NormKind, Projected,
    QueryKeyNorm, Rope, RopeSets, Scale, Scales, Turned, Windows,
};

/// All of them, in the order in which they are listed.
pub(super) const ALL: &[Blueprint] = &[LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA3, PHI3, MIXTRAL];

const KEYS: Keys = Keys {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    inner: "intermediate_size",
    positions: "max_position_embeddings",
    norm_eps: "rms_norm_eps",
    activation: &["hidden_act"],
};

const DEFAULTS: Defaults = Defaults {
    heads: None,
    kv_heads: None,
    head_dim: None,
    inner_times: None,
    norm_eps: 1e-6,
    activation: "silu",
    tied: None,
};

const NAMES: Names = Names {
    prefixes: &["model.", "language_model.model.", "model.language_model.", ""],
    embedding: "embed_tokens",
    positions: None,
    layers: "layers",
    last_norm: "norm",
    attention_norm: Some("input_layernorm"),
    attention_post_norm: None,
    mlp_norm: Some("post_attention_layernorm"),
    mlp_post_norm: None,
    projections: Projected::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    output: "self_attn.o_proj",
    query_key_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    mlp: MlpNames::Gated(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
};

const ATTENTION_BIAS: Bias = Bias::Key("attention_bias", false);

const BIASES: Biases = Biases { qkv: ATTENTION_BIAS, output: ATTENTION_BIAS, mlp: Bias::Never };

const ROPE: Rope = Rope {
    theta: 1e4,
    partial: None,
    neighbours: false,
    layers: Turned::All,
    sets: RopeSets::One,
    yarn_is_longrope: false,
};

const SCALES: Scales = Scales {
    embedding: Scale::One,
    residual: Scale::One,
    attention: Scale::ByRootOfHead,
    logits: Scale::One,
};

const NO_CAPS: Caps = Caps { attention: None, logits: None };

/// Llama 1 to 3.x, SmolLM2 and everything else that loads as `LlamaForCausalLM`.
const LLAMA: Blueprint = Blueprint {
    name: "Llama",
    model_types: &["llama"],
    keys: KEYS,
    defaults: DEFAULTS,
    names: NAMES,
    norm: NormKind::Rms,
    parallel: false,
    query_key_norm: QueryKeyNorm::None,
    biases: Biases { mlp: Bias::Key("mlp_bias", false), ..BIASES },
    transposed: false,
    experts: None,
    windows: Windows::Never,
    rope: Some(ROPE),
    scales: SCALES,
    caps: NO_CAPS,
    fixed: &[],
};

/// Llama with a sliding window.
const MISTRAL: Blueprint =
    Blueprint { name: "Mistral", model_types: &["mistral"], biases: BIASES, windows: Windows::All, ..LLAMA };

/// Qwen2 and Qwen2.5: biases on query, key and value.
const QWEN2: Blueprint = Blueprint {
    name: "Qwen2",
    model_types: &["qwen2"],
    biases: Biases { qkv: Bias::Always, ..BIASES },
    windows: Windows::FromLayer,
    ..LLAMA
};

/// A norm on each head's query and key.
const QWEN3: Blueprint = Blueprint {
    name: "Qwen3",
    model_types: &["qwen3"],
    defaults: Defaults { head_dim: Some(128), ..DEFAULTS },
    query_key_norm: QueryKeyNorm::Heads,
    biases: BIASES,
    windows: Windows::FromLayer,
    ..LLAMA
};

/// Qwen3 with experts.
const QWEN3_MOE: Blueprint = Blueprint {
    name: "Qwen3 MoE",
    model_types: &["qwen3_moe"],
    experts: Some(Experts {
        module: "mlp",
        names: ["gate_proj", "up_proj", "down_proj"],
        router: "gate",
        // transformers 5 writes the name that Mixtral has.
        count: &["num_experts", "num_local_experts"],
        intermediate: "moe_intermediate_size",
        normalise: Bias::Key("norm_topk_prob", false),
        sparse_layers: true,
    }),
    windows: Windows::IfUsed,
    ..QWEN3
};

/// The text model of Gemma 3: norms before and after, every sixth layer sees everything.
const GEMMA3: Blueprint = Blueprint {
    name: "Gemma 3",
    model_types: &["gemma3", "gemma3_text"],
    keys: Keys { activation: &["hidden_activation", "hidden_act"], ..KEYS },
    defaults: Defaults {
        heads: Some(8),
        kv_heads: Some(4),
        head_dim: Some(256),
        activation: "gelu_pytorch_tanh",
        tied: Some(true),
        ..DEFAULTS
    },
    names: Names {
        attention_post_norm: Some("post_attention_layernorm"),
        mlp_norm: Some("pre_feedforward_layernorm"),
        mlp_post_norm: Some("post_feedforward_layernorm"),
        ..NAMES
    },
    norm: NormKind::RmsPlusOne,
    query_key_norm: QueryKeyNorm::Heads,
    biases: BIASES,
    windows: Windows::Pattern {
        keys: &["sliding_window_pattern", "_sliding_window_pattern"],
        every: 6,
        window: 4096,
    },
    rope: Some(Rope {
        theta: 1e6,
        sets: RopeSets::ByWindow { key: "rope_local_base_freq", theta: 1e4 },
        ..ROPE
    }),
    scales: Scales {
        embedding: Scale::RootOfHidden,
        attention: Scale::ByRootOf("query_pre_attn_scalar", 256.0),
        ..SCALES
    },
    // Its attention takes no notice of attn_logit_softcapping.
    caps: Caps { logits: Some(("final_logit_softcapping", None)), ..NO_CAPS },
    ..LLAMA
};

/// Phi-3 and Phi-4-mini: query, key and value in one matrix, gate and up in another.
const PHI3: Blueprint = Blueprint {
    name: "Phi-3",
    model_types: &["phi3"],
    defaults: Defaults { norm_eps: 1e-5, ..DEFAULTS },
    names: Names {
        projections: Projected::Fused("self_attn.qkv_proj"),
        mlp: MlpNames::Fused(["mlp.gate_up_proj", "mlp.down_proj"]),
        ..NAMES
    },
    biases: BIASES,
    windows: Windows::All,
    rope: Some(Rope { partial: Some(1.0), yarn_is_longrope: true, ..ROPE }),
    ..LLAMA
};

/// Mistral with experts.
const MIXTRAL: Blueprint = Blueprint {
    name: "Mixtral",
    model_types: &["mixtral"],
    defaults: Defaults { norm_eps: 1e-5, ..DEFAULTS },
    biases: BIASES,
    experts: Some(Experts {
        module: "block_sparse_moe",
        names: ["w1", "w3", "w2"],
        router: "gate",
        count: &["num_local_experts"],
        intermediate: "intermediate_size",
        normalise: Bias::Always,
        sparse_layers: false,
    }),
    windows: Windows::All,
    rope: Some(Rope { theta: 1e6, ..ROPE }),
    ..LLAMA
};
