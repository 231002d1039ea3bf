//! The architectures that run. What an entry does not say is as Llama has it.

mod deepseek;
mod gpt_oss;
mod llama4;
mod qwen3_next;

use super::{
    Bias, Biases, Blueprint, Caps, Defaults, ExpertLayers, Experts, Keys, MlpNames, Names, NormKind,
    Projected, QueryKeyNorm, Rope, RopeSets, Scale, Scales, Scores, Turned, Windows,
};
use crate::blueprint::mixers::PLAIN;
use deepseek::{DEEPSEEK_V2, DEEPSEEK_V3};
use gpt_oss::GPT_OSS;
use llama4::LLAMA4;
use qwen3_next::{QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT};

/// All of them, in the order in which they are listed.
pub(super) const ALL: &[Blueprint] = &[
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA3,
    PHI3,
    MIXTRAL,
    SMOLLM3,
    GRANITE,
    OLMO2,
    OLMO3,
    GEMMA2,
    COHERE2,
    GLM4,
    STARCODER2,
    GPT2,
    GPT_OSS,
    DEEPSEEK_V3,
    DEEPSEEK_V2,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    LLAMA4,
];

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

/// Experts as Qwen3 has them.
const EXPERTS: Experts = Experts {
    module: "mlp",
    names: ["gate_proj", "up_proj", "down_proj"],
    stacked: None,
    router: "gate",
    router_bias: false,
    correction: None,
    // transformers 5 writes the name that Mixtral has.
    count: &["num_experts", "num_local_experts"],
    intermediate: "moe_intermediate_size",
    scores: Scores::Softmax,
    groups: None,
    normalise: Bias::Key("norm_topk_prob", false),
    scale: None,
    weighs_inputs: false,
    clamp: None,
    shared: None,
    layers: ExpertLayers::SparseStep,
};

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
    mixers: PLAIN,
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
    experts: Some(EXPERTS),
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
        sets: RopeSets::ByWindow { key: Some("rope_local_base_freq"), theta: 1e4 },
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
        count: &["num_local_experts"],
        intermediate: "intermediate_size",
        normalise: Bias::Always,
        layers: ExpertLayers::All,
        ..EXPERTS
    }),
    windows: Windows::All,
    rope: Some(Rope { theta: 1e6, ..ROPE }),
    ..LLAMA
};

/// Llama with layers that do not turn queries and keys.
const SMOLLM3: Blueprint = Blueprint {
    name: "SmolLM3",
    model_types: &["smollm3"],
    defaults: Defaults { heads: Some(16), kv_heads: Some(4), tied: Some(true), ..DEFAULTS },
    windows: Windows::Unturned,
    rope: Some(Rope { theta: 2e6, layers: Turned::Listed(4), ..ROPE }),
    ..LLAMA
};

/// Llama with factors on embedding, scores, what sub-layers add, and logits.
const GRANITE: Blueprint = Blueprint {
    name: "Granite",
    model_types: &["granite"],
    scales: Scales {
        embedding: Scale::Times("embedding_multiplier", 1.0),
        residual: Scale::Times("residual_multiplier", 1.0),
        attention: Scale::Times("attention_multiplier", 1.0),
        logits: Scale::DividedBy("logits_scaling", 1.0),
    },
    ..LLAMA
};

/// OLMo 2: norms of what sub-layers give out alone, and of whole queries and keys.
const OLMO2: Blueprint = Blueprint {
    name: "OLMo 2",
    model_types: &["olmo2"],
    defaults: Defaults { norm_eps: 1e-5, ..DEFAULTS },
    names: Names {
        attention_norm: None,
        attention_post_norm: Some("post_attention_layernorm"),
        mlp_norm: None,
        mlp_post_norm: Some("post_feedforward_layernorm"),
        ..NAMES
    },
    query_key_norm: QueryKeyNorm::Whole,
    biases: BIASES,
    ..LLAMA
};

/// OLMo 2 with windows in all but every fourth layer.
const OLMO3: Blueprint = Blueprint {
    name: "OLMo 3",
    model_types: &["olmo3"],
    windows: Windows::Pattern { keys: &[], every: 4, window: 4096 },
    rope: Some(Rope { theta: 5e5, sets: RopeSets::ByWindow { key: None, theta: 5e5 }, ..ROPE }),
    ..OLMO2
};

/// Gemma 3 without norms of heads, with capped scores and logits; every other layer sees everything.
const GEMMA2: Blueprint = Blueprint {
    name: "Gemma 2",
    model_types: &["gemma2"],
    query_key_norm: QueryKeyNorm::None,
    windows: Windows::Pattern { keys: &[], every: 2, window: 4096 },
    rope: Some(ROPE),
    caps: Caps {
        attention: Some(("attn_logit_softcapping", Some(50.0))),
        logits: Some(("final_logit_softcapping", Some(30.0))),
    },
    ..GEMMA3
};

/// Command R7B and Command A: attention and MLP side by side, windows with rotary embeddings and layers without either.
const COHERE2: Blueprint = Blueprint {
    name: "Cohere 2",
    model_types: &["cohere2"],
    keys: Keys { norm_eps: "layer_norm_eps", ..KEYS },
    defaults: Defaults { norm_eps: 1e-5, tied: Some(true), ..DEFAULTS },
    names: Names { mlp_norm: Some("input_layernorm"), ..NAMES },
    norm: NormKind::Layer { bias: false },
    parallel: true,
    biases: BIASES,
    windows: Windows::Pattern {
        keys: &["sliding_window_pattern", "_sliding_window_pattern"],
        every: 4,
        window: 4096,
    },
    rope: Some(Rope { neighbours: true, layers: Turned::Windowed, ..ROPE }),
    scales: Scales { logits: Scale::Times("logit_scale", 0.0625), ..SCALES },
    ..LLAMA
};

/// GLM-4-0414: norms before and after, neighbouring features turned.
const GLM4: Blueprint = Blueprint {
    name: "GLM-4",
    model_types: &["glm4"],
    defaults: Defaults {
        heads: Some(32),
        kv_heads: Some(2),
        head_dim: Some(128),
        norm_eps: 1.5625e-7,
        ..DEFAULTS
    },
    names: Names {
        attention_post_norm: Some("post_self_attn_layernorm"),
        mlp_post_norm: Some("post_mlp_layernorm"),
        mlp: MlpNames::Fused(["mlp.gate_up_proj", "mlp.down_proj"]),
        ..NAMES
    },
    biases: Biases { qkv: Bias::Key("attention_bias", true), output: Bias::Never, mlp: Bias::Never },
    rope: Some(Rope { partial: Some(0.5), neighbours: true, ..ROPE }),
    ..LLAMA
};

/// StarCoder2: layer norms and biases everywhere, an MLP without a gate.
const STARCODER2: Blueprint = Blueprint {
    name: "StarCoder2",
    model_types: &["starcoder2"],
    keys: Keys { norm_eps: "norm_epsilon", ..KEYS },
    defaults: Defaults {
        heads: Some(24),
        kv_heads: Some(2),
        norm_eps: 1e-5,
        activation: "gelu_pytorch_tanh",
        tied: Some(true),
        ..DEFAULTS
    },
    names: Names { mlp: MlpNames::Plain(["mlp.c_fc", "mlp.c_proj"]), ..NAMES },
    norm: NormKind::Layer { bias: true },
    biases: Biases { qkv: USE_BIAS, output: USE_BIAS, mlp: USE_BIAS },
    windows: Windows::All,
    ..LLAMA
};

const USE_BIAS: Bias = Bias::Key("use_bias", true);

/// GPT-2: learned positions, matrices stored as `[inputs, outputs]`, query, key and value in one.
const GPT2: Blueprint = Blueprint {
    name: "GPT-2",
    model_types: &["gpt2"],
    keys: Keys {
        hidden: "n_embd",
        layers: "n_layer",
        heads: "n_head",
        inner: "n_inner",
        positions: "n_positions",
        norm_eps: "layer_norm_epsilon",
        activation: &["activation_function"],
    },
    defaults: Defaults {
        inner_times: Some(4),
        norm_eps: 1e-5,
        activation: "gelu_new",
        tied: Some(true),
        ..DEFAULTS
    },
    names: Names {
        prefixes: &["transformer.", ""],
        embedding: "wte",
        positions: Some("wpe"),
        layers: "h",
        last_norm: "ln_f",
        attention_norm: Some("ln_1"),
        mlp_norm: Some("ln_2"),
        projections: Projected::Fused("attn.c_attn"),
        output: "attn.c_proj",
        mlp: MlpNames::Plain(["mlp.c_fc", "mlp.c_proj"]),
        ..NAMES
    },
    norm: NormKind::Layer { bias: true },
    biases: Biases { qkv: Bias::Always, output: Bias::Always, mlp: Bias::Always },
    transposed: true,
    rope: None,
    fixed: &[
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
    ],
    ..LLAMA
};
