#!/usr/bin/env python3
"""Golden values for the model crate, made by transformers.

    python make_golden.py cases [--case NAME ...]      # <case>/ beside this script
    python make_golden.py check [--case NAME ...]      # reload what is on disk, recompute, compare
    python make_golden.py sparse LLMPRESS              # llama_sparse24/ beside this script, from the case llama
    python make_golden.py mxfp4                        # ../mxfp4/gpt_oss/ beside the folder of this script
    python make_golden.py forms                        # rope_forms.json beside this script, from the cases there are
    python make_golden.py real NAME=MODEL_DIR:TEXT ... # real.json beside this script

Run with Python 3.11, on a CPU, and:

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 tokenizers==0.23.3 numpy==2.4.6

`check` also runs under transformers 4.57.6, where it reads every `config_v4.json` in place of `config.json`.

cases
    Tiny random checkpoints as `save_pretrained` writes them (`config.json`, `model.safetensors`, BF16), and
    `golden.safetensors`, computed with the weights upcast to F32 and eager attention:

    input_ids      I64 [T]
    logits         F32 [T, V]  one forward over input_ids, no cache
    greedy         I64 [12]    greedy continuation of input_ids[:8], the whole sequence recomputed for each token
    greedy_logits  F32 [V]     the logits that the last token of `greedy` was taken from

    Its metadata entry `case` is JSON: `greedy_margin`, the smallest distance of the two largest logits on the way;
    `router_margin`, the smallest distance of the last expert chosen and the first one not chosen, in router logits
    (MoE only); `cached_difference`, the largest difference of `greedy_logits` from a run with a KV cache, which is
    rounding unless the rotary frequencies change on the way; `cached_greedy`, the tokens of that run where they are
    others.

    `config_v4.json` is the same configuration as transformers 4 wrote it. Both give the same logits.

    Each case states changes of its configuration or weights which must show in the logits; they are tried when it is
    made, so that a reader who forgets one of these features fails the case: each moves a logit by more than 5e-4 (most
    by more than 0.1), while rounding moves them by about 1e-5. Changes which must not show are tried too.

sparse
    The case `llama` with two of four weights of each linear: what the program LLMPRESS leaves of it by `convert --to
    sparse24:magnitude` and then `restore`, plain with zeros, with golden.safetensors as above, over the same input_ids.
    (Made by transformers 5.24.0.)

mxfp4
    A gpt-oss whose experts are stored as MXFP4, of random blocks and scales. transformers makes their numbers, and computes
    golden.safetensors as above. (Made by transformers 5.24.0, as are the cases from gpt_oss on.)

forms
    The ways in which configurations say what the rotary embedding is, each on the weights of a case: `changes` of its
    config.json (null takes a key out; those of a multimodal one are of its text_config) and the `logits` of the last
    token, or `refused` where transformers fails.

real
    One entry of real.json a model (the other entries are kept), computed with the weights upcast to F32 and SDPA,
    without a BOS token, from the start of TEXT: `ids` of the first 64 tokens; `top` (ten largest ids and logits after
    them), `first` (logits of ids 0 to 15), `logsumexp` and `mean` of these logits; `nll` (natural log) of tokens 1 to
    63; `greedy`, 32 tokens after the first 16; `perplexity` over the first 8,192 tokens in windows of 512 of which
    tokens 1 to 511 are scored, its `mean_nll` and the `windows` they are the mean of. `ids_sha256` is of the 8,192 ids
    as little-endian U32.
"""

import argparse
import copy
import hashlib
import json
import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent
VERSION_4 = transformers.__version__.startswith("4.")
PROMPT, NEW = 8, 12
SHOWS = 5e-4

# Dimensions shared by the cases; each case overrides some.
BASE = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.02,
)
# Those of them that GPT-2 has, under the same names.
GPT2 = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
THETA = 10000.0
# Keys of Gemma 3 that transformers 4 did not write.
GEMMA_5 = ("layer_types", "_sliding_window_pattern", "use_bidirectional_attention")
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": THETA}
SHORT = [1.0, 1.05, 1.2, 1.5, 1.9, 2.4]
LONG = [1.1, 1.6, 2.5, 4.0, 6.5, 9.0]


def rope(rope_type, theta=THETA, **parameters):
    return {"rope_type": rope_type, "rope_theta": theta, **parameters}


def v4(old=None, remove=(), rope_theta=THETA, **extra):
    """Describes config_v4.json: `old` is its rope_scaling, `remove` and `extra` are other keys."""
    return dict(old=old, remove=remove, rope_theta=rope_theta, extra=extra)


def without(suffix, value=0.0):
    """A change of weights: all that end in `suffix` are set to `value`."""

    def change(parameters):
        found = [parameter for name, parameter in parameters.items() if name.endswith(suffix)]
        assert found, suffix
        for parameter in found:
            parameter.data.fill_(value)

    return change


def llama(rope_parameters=DEFAULT_ROPE, **other):
    return dict(model_type="llama", rope_parameters=rope_parameters, **other)


# name: (configuration, T, V4 twin or None, changes that must show, changes that must not)
CASES = {
    "llama": (llama(hidden_size=48, num_attention_heads=6, intermediate_size=80, num_hidden_layers=2), 40, None,
              {"theta": {"rope_parameters": rope("default", 20000.0)}, "eps": {"rms_norm_eps": 1e-2}}, {}),
    "llama_tied": (llama(tie_word_embeddings=True, vocab_size=151, num_key_value_heads=1), 40, None, {}, {}),
    "llama_bias": (llama(attention_bias=True, mlp_bias=True), 40, None,
                   {k: without(f"{k}_proj.bias") for k in ("q", "k", "v", "o", "gate", "up", "down")}, {}),
    "llama_head_dim": (llama(head_dim=16), 40, None, {}, {}),
    "llama3_rope": (
        llama(rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32), head_dim=16, num_hidden_layers=2, max_position_embeddings=256),
        48,
        v4({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}),
        {"rope": {"rope_parameters": DEFAULT_ROPE},
         "high": {"rope_parameters": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=8.0,
                                          original_max_position_embeddings=32)}}, {}),
    "llama_linear": (llama(rope("linear", factor=4.0)), 48, v4({"type": "linear", "factor": 4.0}),
                     {"rope": {"rope_parameters": DEFAULT_ROPE}}, {}),
    "llama_dynamic": (llama(rope("dynamic", factor=2.0), max_position_embeddings=24), 56,
                      v4({"rope_type": "dynamic", "factor": 2.0}),
                      {"rope": {"rope_parameters": DEFAULT_ROPE}}, {}),
    "llama_yarn": (
        llama(rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32), head_dim=16, num_hidden_layers=2),
        48, v4({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, rope_theta=1000.0),
        {"rope": {"rope_parameters": rope("default", 1000.0)},
         "attention_factor": {"rope_parameters": rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32,
                                                      attention_factor=1.0)}}, {}),
    "llama_yarn_mscale": (
        llama(rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.25,
                   mscale=1.5, mscale_all_dim=0.5, truncate=False), head_dim=16, num_hidden_layers=2), 48, None,
        {"truncate": {"rope_parameters": rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32,
                                              beta_fast=4.0, beta_slow=0.25, mscale=1.5, mscale_all_dim=0.5)},
         "mscale": {"rope_parameters": rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32,
                                            beta_fast=4.0, beta_slow=0.25, truncate=False)},
         "beta": {"rope_parameters": rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32,
                                          mscale=1.5, mscale_all_dim=0.5, truncate=False)}}, {}),
    "llama_yarn_factor": (
        llama(rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32, attention_factor=1.3,
                   beta_fast=8.0, beta_slow=0.5), head_dim=16, num_hidden_layers=2), 48, None,
        {"attention_factor": {"rope_parameters": rope("yarn", 1000.0, factor=4.0, beta_fast=8.0, beta_slow=0.5,
                                                      original_max_position_embeddings=32)}}, {}),
    "mistral": (dict(model_type="mistral", sliding_window=6, head_dim=16, num_hidden_layers=2,
                     rope_parameters=DEFAULT_ROPE), 40, None,
                {"window": {"sliding_window": None}, "one more": {"sliding_window": 7},
                 "one less": {"sliding_window": 5}}, {}),
    "qwen2": (dict(model_type="qwen2", rope_parameters=rope("default", 1e6)), 40, None,
              {k: without(f"{k}_proj.bias") for k in ("q", "k", "v")}, {}),
    "qwen2_sliding": (dict(model_type="qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=6,
                           max_window_layers=2, rope_parameters=rope("default", 1e6)), 40, None,
                      {"window": {"use_sliding_window": False, "layer_types": None},
                       "all layers": {"layer_types": ["sliding_attention"] * 4},
                       "first layers": {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}}, {}),
    "qwen3": (dict(model_type="qwen3", head_dim=16, rope_parameters=rope("default", 1e6), tie_word_embeddings=True),
              40, None, {"q_norm": without("q_norm.weight", 1.0), "k_norm": without("k_norm.weight", 1.0)}, {}),
    "gemma3_text": (
        dict(model_type="gemma3_text", hidden_size=48, head_dim=16, num_hidden_layers=4, query_pre_attn_scalar=24,
             sliding_window=6, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
             num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
             layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
             rope_parameters={"full_attention": rope("default", 1e6), "sliding_attention": DEFAULT_ROPE}),
        40,
        v4(remove=GEMMA_5, rope_theta=1e6, rope_local_base_freq=THETA, sliding_window_pattern=3),
        {"scale": {"query_pre_attn_scalar": 16}, "window": {"sliding_window": 7},
         "pattern": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
         "global theta": {"rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": DEFAULT_ROPE}},
         "local theta": {"rope_parameters": {"full_attention": rope("default", 1e6),
                                             "sliding_attention": rope("default", 1e6)}},
         "erf": {"hidden_activation": "gelu"}, "q_norm": without("q_norm.weight"), "k_norm": without("k_norm.weight")},
        {}),
    "gemma3_softcap": (
        dict(model_type="gemma3_text", head_dim=16, num_hidden_layers=3, query_pre_attn_scalar=16, sliding_window=8,
             hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, attn_logit_softcapping=2.0,
             final_logit_softcapping=3.0,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             rope_parameters={"full_attention": rope("linear", 1e6, factor=8.0), "sliding_attention": DEFAULT_ROPE}),
        48,
        v4({"rope_type": "linear", "factor": 8.0}, remove=GEMMA_5, rope_theta=1e6,
           rope_local_base_freq=THETA, sliding_window_pattern=2),
        {"final": {"final_logit_softcapping": None},
         "linear": {"rope_parameters": {"full_attention": rope("default", 1e6), "sliding_attention": DEFAULT_ROPE}}},
        # Gemma 3's attention takes no notice of attn_logit_softcapping.
        {"attention": {"attn_logit_softcapping": None}}),
    # Only the text model is run; the image model is there to be passed over.
    "gemma3_multimodal": (
        dict(model_type="gemma3", mm_tokens_per_image=1, boi_token_index=125, eoi_token_index=126,
             image_token_index=127, tie_word_embeddings=True,
             text_config=dict(
                 head_dim=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
                 query_pre_attn_scalar=16, sliding_window=6, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
                 tie_word_embeddings=True,
                 layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                 rope_parameters={"full_attention": rope("linear", 1e6, factor=8.0),
                                  "sliding_attention": DEFAULT_ROPE}),
             vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                image_size=8, patch_size=4)),
        48,
        v4({"rope_type": "linear", "factor": 8.0},
           remove=GEMMA_5, rope_theta=1e6,
           rope_local_base_freq=THETA, sliding_window_pattern=2), {}, {}),
    "phi3": (dict(model_type="phi3", sliding_window=7, rope_parameters=DEFAULT_ROPE,
                  original_max_position_embeddings=128), 40, None,
             {"window": {"sliding_window": None}, "one more": {"sliding_window": 8}}, {}),
    "phi3_longrope": (
        dict(model_type="phi3", hidden_size=64, num_hidden_layers=2, intermediate_size=48, sliding_window=None,
             num_key_value_heads=1, original_max_position_embeddings=32,
             rope_parameters=rope("longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.75,
                                  original_max_position_embeddings=32)),
        48, v4({"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
               partial_rotary_factor=0.75, original_max_position_embeddings=32),
        {"long": {"rope_parameters": rope("longrope", short_factor=SHORT, long_factor=SHORT,
                                          partial_rotary_factor=0.75, original_max_position_embeddings=32)},
         "attention_factor": {"rope_parameters": rope("longrope", short_factor=SHORT, long_factor=LONG,
                                                      attention_factor=1.0, partial_rotary_factor=0.75,
                                                      original_max_position_embeddings=32)}},
        {"short": {"rope_parameters": rope("longrope", short_factor=LONG, long_factor=LONG,
                                           partial_rotary_factor=0.75, original_max_position_embeddings=32)}}),
    "phi3_longrope_short": (
        dict(model_type="phi3", hidden_size=64, num_hidden_layers=2, intermediate_size=48, sliding_window=None,
             num_key_value_heads=1, original_max_position_embeddings=64, max_position_embeddings=256,
             rope_parameters=rope("longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.75,
                                  original_max_position_embeddings=64)),
        48, v4({"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
               partial_rotary_factor=0.75, original_max_position_embeddings=64),
        {"short": {"rope_parameters": rope("longrope", short_factor=LONG, long_factor=LONG,
                                           partial_rotary_factor=0.75, original_max_position_embeddings=64)}},
        {"long": {"rope_parameters": rope("longrope", short_factor=SHORT, long_factor=SHORT,
                                          partial_rotary_factor=0.75, original_max_position_embeddings=64)}}),
    "phi3_longrope_switch": (
        dict(model_type="phi3", hidden_size=64, num_hidden_layers=2, intermediate_size=48, sliding_window=None,
             num_key_value_heads=1, original_max_position_embeddings=16, max_position_embeddings=64,
             rope_parameters=rope("longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.75,
                                  original_max_position_embeddings=16)),
        16, v4({"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
               partial_rotary_factor=0.75, original_max_position_embeddings=16),
        {"short": {"rope_parameters": rope("longrope", short_factor=LONG, long_factor=LONG,
                                           partial_rotary_factor=0.75, original_max_position_embeddings=16)}},
        {"long": {"rope_parameters": rope("longrope", short_factor=SHORT, long_factor=SHORT,
                                          partial_rotary_factor=0.75, original_max_position_embeddings=16)}}),
    "mixtral": (dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=48,
                     num_hidden_layers=2, sliding_window=None, rope_parameters=rope("default", 1e6)), 40, None,
                {"top": {"num_experts_per_tok": 1}, "router": without(".gate.weight")}, {}),
    "qwen3_moe": (
        dict(model_type="qwen3_moe", head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
             decoder_sparse_step=1, mlp_only_layers=[1], norm_topk_prob=True, rope_parameters=rope("default", 1e6)),
        40, v4(rope_theta=1e6), {"top": {"num_experts_per_tok": 3}, "norm": {"norm_topk_prob": False}}, {}),
    "qwen3_moe_nonorm": (
        dict(model_type="qwen3_moe", head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16,
             decoder_sparse_step=2, mlp_only_layers=[], norm_topk_prob=False, num_hidden_layers=4,
             intermediate_size=32, vocab_size=112, rope_parameters=rope("default", 1e6)),
        40, None, {"norm": {"norm_topk_prob": True}}, {}),
    "smollm3": (dict(model_type="smollm3", num_hidden_layers=4, intermediate_size=48, no_rope_layers=[1, 0, 1, 1],
                     rope_parameters=rope("default", 2e4)), 40, None,
                {"all turn": {"no_rope_layers": [1, 1, 1, 1]}, "others turn": {"no_rope_layers": [1, 1, 0, 1]}}, {}),
    "smollm3_sliding": (dict(model_type="smollm3", num_hidden_layers=4, intermediate_size=48, no_rope_layer_interval=2,
                             use_sliding_window=True, sliding_window=6, rope_parameters=rope("default", 2e4)), 40, None,
                        {"window": {"use_sliding_window": False, "layer_types": None},
                         "one more": {"sliding_window": 7}}, {}),
    "granite": (dict(model_type="granite", num_hidden_layers=2, embedding_multiplier=3.0, residual_multiplier=0.4,
                     attention_multiplier=0.2, logits_scaling=0.5, attention_bias=True, mlp_bias=True,
                     rope_parameters=DEFAULT_ROPE), 40, None,
                {"embedding": {"embedding_multiplier": 1.0}, "residual": {"residual_multiplier": 1.0},
                 "attention": {"attention_multiplier": 0.3}, "logits": {"logits_scaling": 1.0},
                 "bias": without("down_proj.bias")}, {}),
    "olmo2": (dict(model_type="olmo2", num_hidden_layers=2, rms_norm_eps=1e-6, rope_parameters=DEFAULT_ROPE), 40, None,
              {"q_norm": without("q_norm.weight", 1.0), "k_norm": without("k_norm.weight", 1.0),
               "post": without("post_feedforward_layernorm.weight", 1.0)}, {}),
    "olmo3": (dict(model_type="olmo3", num_hidden_layers=4, intermediate_size=48, sliding_window=6,
                   layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                   rope_parameters={"full_attention": rope("yarn", 1000.0, factor=4.0,
                                                           original_max_position_embeddings=32),
                                    "sliding_attention": rope("default", 1000.0)}), 48, None,
              {"window": {"sliding_window": 7},
               "full": {"rope_parameters": {"full_attention": rope("default", 1000.0),
                                            "sliding_attention": rope("default", 1000.0)}},
               "pattern": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}}, {}),
    "gemma2": (
        dict(model_type="gemma2", head_dim=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
             intermediate_size=48, query_pre_attn_scalar=24, sliding_window=6, attn_logit_softcapping=2.0,
             final_logit_softcapping=3.0, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
             tie_word_embeddings=True, rope_parameters=DEFAULT_ROPE), 40, None,
        {"scores": {"attn_logit_softcapping": None}, "logits": {"final_logit_softcapping": None},
         "scale": {"query_pre_attn_scalar": 16}, "window": {"sliding_window": 7},
         "pattern": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}}, {}),
    "cohere2": (dict(model_type="cohere2", num_hidden_layers=3, intermediate_size=48, sliding_window=6,
                     layer_norm_eps=1e-5, logit_scale=0.4, tie_word_embeddings=True,
                     layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                     rope_parameters=DEFAULT_ROPE), 40, None,
                {"scale": {"logit_scale": 1.0}, "window": {"sliding_window": 7}, "eps": {"layer_norm_eps": 1e-2},
                 "pattern": {"layer_types": ["sliding_attention"] * 3}}, {}),
    "glm4": (dict(model_type="glm4", num_hidden_layers=2, head_dim=16, intermediate_size=48, attention_bias=True,
                  rope_parameters=rope("default", partial_rotary_factor=0.5)), 40, None,
             {"partial": {"rope_parameters": rope("default", partial_rotary_factor=1.0)},
              "post": without("post_self_attn_layernorm.weight", 1.0), "bias": without("q_proj.bias")}, {}),
    "starcoder2": (dict(model_type="starcoder2", num_hidden_layers=2, intermediate_size=96, sliding_window=6,
                        norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
                        rope_parameters=DEFAULT_ROPE), 40, None,
                   {"window": {"sliding_window": 7}, "norm bias": without("input_layernorm.bias"),
                    "last norm": without("model.norm.bias"), "bias": without("c_fc.bias"),
                    "erf": {"hidden_act": "gelu"}}, {}),
    "gpt2": (dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=None,
                  activation_function="gelu_new"), 40, None,
             {"positions": without("wpe.weight"), "bias": without("c_attn.bias"), "norm bias": without("ln_1.bias"),
              "eps": {"layer_norm_epsilon": 1e-2}}, {}),
    "gpt_oss": (
        dict(model_type="gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24,
             sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             swiglu_limit=0.6, attention_bias=True,
             rope_parameters=rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0,
                                  beta_slow=0.25, truncate=False)),
        40, None,
        {"limit": {"swiglu_limit": 7.0}, "alpha": {"swiglu_alpha": 1.0}, "top": {"num_experts_per_tok": 1},
         "window": {"sliding_window": 7}, "sinks": without("sinks", -100.0), "router": without("router.bias"),
         "gate_up": without("gate_up_proj_bias"), "down": without("down_proj_bias"), "o": without("o_proj.bias"),
         "q": without("q_proj.bias"), "v": without("v_proj.bias")}, {}),
    "deepseek_v3": (
        dict(model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=4, v_head_dim=12, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
             n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=1, routed_scaling_factor=2.5,
             norm_topk_prob=True, num_mtp_layers=0,
             rope_parameters=rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0,
                                  beta_slow=0.25, mscale=1.5, mscale_all_dim=0.8)),
        40, None,
        {"scaling": {"routed_scaling_factor": 1.0}, "norm": {"norm_topk_prob": False}, "groups": {"topk_group": 3},
         "interleave": {"rope_interleave": False}, "top": {"num_experts_per_tok": 2},
         "mscale": {"rope_parameters": rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32,
                                            beta_fast=4.0, beta_slow=0.25, mscale=1.5, mscale_all_dim=0.4)},
         "correction": {"__buffers__": "e_score_correction_bias"}, "shared": without("shared_experts.down_proj.weight"),
         "q_a": without("q_a_layernorm.weight", 1.0), "kv_a": without("kv_a_layernorm.weight", 1.0)}, {}),
    "deepseek_v3_plain": (
        dict(model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
             n_shared_experts=2, moe_intermediate_size=8, first_k_dense_replace=0, routed_scaling_factor=1.5,
             norm_topk_prob=False, rope_interleave=False, attention_bias=True, num_hidden_layers=2, num_mtp_layers=0,
             rope_parameters=DEFAULT_ROPE),
        40, None, {"interleave": {"rope_interleave": True}, "norm": {"norm_topk_prob": True},
                   "kv_a": without("kv_a_proj_with_mqa.bias"), "o": without("o_proj.bias")}, {}),
    "deepseek_v2": (
        dict(model_type="deepseek_v2", num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
             topk_method="group_limited_greedy", n_shared_experts=1, moe_intermediate_size=16,
             first_k_dense_replace=1, routed_scaling_factor=3.0,
             rope_parameters=rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32, mscale=0.7,
                                  mscale_all_dim=0.7)),
        40, None, {"scaling": {"routed_scaling_factor": 1.0}, "groups": {"topk_method": "greedy"}}, {}),
    "qwen3_next": (
        dict(model_type="qwen3_next", head_dim=16, num_hidden_layers=4, linear_key_head_dim=8, linear_value_head_dim=6,
             linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2,
             moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[1], intermediate_size=32,
             rope_parameters=rope("default", partial_rotary_factor=0.25)),
        40, None,
        {"conv": without("conv1d.weight", 0.2), "A": without("A_log"), "dt": without("dt_bias"),
         "norm": without("linear_attn.norm.weight", 1.0), "shared": without("shared_expert_gate.weight"),
         "rope": {"rope_parameters": rope("default", partial_rotary_factor=1.0)}, "top": {"num_experts_per_tok": 1},
         "normalise": {"norm_topk_prob": False}}, {}),
    "qwen3_5": (
        dict(model_type="qwen3_5_text", head_dim=16, num_hidden_layers=4, linear_key_head_dim=8,
             linear_value_head_dim=6, linear_num_key_heads=2, linear_num_value_heads=4, intermediate_size=48,
             layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
             linear_conv_kernel_dim=3, tie_word_embeddings=True,
             rope_parameters=rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1])),
        40, None, {"conv": without("conv1d.weight", 0.2), "A": without("A_log"), "dt": without("dt_bias"),
                   "z": without("in_proj_z.weight", 0.1)}, {}),
    "qwen3_5_moe": (
        dict(model_type="qwen3_5_moe_text", head_dim=16, num_hidden_layers=2, linear_key_head_dim=8,
             linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, num_experts=4,
             num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24,
             layer_types=["linear_attention", "full_attention"],
             rope_parameters=rope("default", partial_rotary_factor=0.25)),
        40, None, {"shared": without("shared_expert_gate.weight"), "top": {"num_experts_per_tok": 1}}, {}),
    "llama4": (
        dict(model_type="llama4_text", head_dim=16, num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1],
             attention_chunk_size=12, interleave_moe_layer_step=2, floor_scale=4, attn_scale=0.5, num_local_experts=4,
             num_experts_per_tok=1, intermediate_size=16, intermediate_size_mlp=32, rope_parameters=DEFAULT_ROPE),
        40, None,
        {"tuning": {"attn_temperature_tuning": False}, "floor": {"floor_scale": 5}, "chunk": {"attention_chunk_size": 13},
         "qk": {"use_qk_norm": False}, "rope": {"no_rope_layers": [1, 0, 1, 1]}, "top": {"num_experts_per_tok": 2},
         "shared": without("shared_expert.down_proj.weight")}, {}),
    "llama4_plain": (
        dict(model_type="llama4_text", head_dim=16, num_hidden_layers=2, no_rope_layers=[1, 0], use_qk_norm=False,
             attention_chunk_size=64, attn_temperature_tuning=False, num_local_experts=4, num_experts_per_tok=2,
             intermediate_size=16, intermediate_size_mlp=32,
             rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                  original_max_position_embeddings=32)),
        40, None, {"rope": {"rope_parameters": DEFAULT_ROPE}, "qk": {"use_qk_norm": True}}, {}),
}


def make_config(settings):
    settings = copy.deepcopy(settings)
    kind = settings.pop("model_type")
    if kind == "gpt2":
        settings = {key: BASE[key] for key in BASE if key in GPT2} | settings
    elif "text_config" in settings:
        settings["text_config"] = {**BASE, **settings["text_config"]}
    else:
        settings = {**BASE, **settings}
    return AutoConfig.for_model(kind, **settings)


def fill(model, generator):
    """Random weights, large enough that attention and logits are far from uniform."""
    gemma, tied = "gemma" in model.config.model_type, model.config.tie_word_embeddings
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("A_log"):
            # States that last some tokens.
            value = noise - 2.0
        elif "conv1d" in name:
            value = 0.5 * noise
        elif weight.dim() == 1:
            # Norms that add one to their weights; the gated ones of delta layers do not.
            offset = gemma or any(kind in model.config.model_type for kind in ("qwen3_next", "qwen3_5"))
            norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            centre = 1.0 if norm and (not offset or "linear_attn" in name) else 0.0
            value = centre + (1.0 if name.endswith("sinks") else 0.3) * noise
        elif "wpe" in name:
            value = 0.2 * noise
        elif "embed_tokens" in name or "wte" in name:
            # Tied embeddings repeat the last token where they outweigh the layers.
            value = (0.1 if gemma and tied else 0.15 if gemma or tied else 0.5) * noise
        elif "lm_head" in name:
            value = 0.3 * noise
        elif name.endswith((".gate.weight", ".router.weight")):
            value = 0.4 * noise
        elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn")):
            value = 0.25 * noise
        else:
            value = 0.15 * noise
        weight.data = value.to(torch.bfloat16).to(weight.dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = 0.3 * torch.randn(buffer.shape, generator=generator)


def load(path, config=None, attention="eager"):
    kind = {"torch_dtype" if VERSION_4 else "dtype": torch.float32}
    if config is not None:
        kind["config"] = config
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, **kind).eval()


@torch.inference_mode()
def forward(model, ids):
    return model(input_ids=ids[None], use_cache=False).logits[0]


@torch.inference_mode()
def greedy(model, prompt, new):
    """Greedy continuation without a cache, the last logits, and the smallest margin."""
    ids, margin = prompt.clone(), math.inf
    for _ in range(new):
        logits = forward(model, ids)[-1]
        top = logits.topk(2).values
        margin = min(margin, float(top[0] - top[1]))
        ids = torch.cat([ids, logits.argmax()[None]])
    return ids[len(prompt):], logits, margin


@torch.inference_mode()
def greedy_cached(model, prompt, new):
    """The same with a KV cache, fed token by token after the prompt."""
    out = model(input_ids=prompt[None], use_cache=True)
    ids = []
    while True:
        logits = out.logits[0, -1]
        ids.append(int(logits.argmax()))
        if len(ids) == new:
            return ids, logits
        out = model(input_ids=torch.tensor([[ids[-1]]]), past_key_values=out.past_key_values, use_cache=True)


@torch.inference_mode()
def router_margin(model, sequences):
    """Smallest distance of the last chosen and the first unchosen expert, in router logits."""
    margins, top = [], getattr(model.config, "num_experts_per_tok", None)

    def gap(scores, count):
        best = scores.sort(dim=-1, descending=True).values
        if count < best.shape[-1]:
            margins.append(float((best[:, count - 1] - best[:, count]).min()))

    def hook(module, inputs, out):
        logits = (out[1] if "Llama4" in type(module).__name__ else out[0] if isinstance(out, tuple) else out).float()
        if "Deepseek" not in type(module).__name__:
            gap(logits, top)
            return
        # Groups first, then experts of these.
        if hasattr(module, "e_score_correction_bias"):
            scores, of_group = logits.sigmoid() + module.e_score_correction_bias, 2
        else:
            scores, of_group = logits, 1
        groups = model.config.n_group
        if groups > 1:
            grouped = scores.view(scores.shape[0], groups, -1)
            worth = grouped.topk(of_group, dim=-1).values.sum(-1)
            gap(worth, model.config.topk_group)
            chosen = worth.topk(model.config.topk_group, dim=-1).indices
            mask = torch.zeros_like(worth).scatter_(1, chosen, 1).bool()
            scores = grouped.masked_fill(~mask[..., None], -1e9).flatten(1)
        gap(scores, top)

    routers = (".gate", ".mlp.router", ".feed_forward.router")
    hooks = [m.register_forward_hook(hook) for n, m in model.named_modules() if n.endswith(routers)]
    for ids in sequences:
        forward(model, ids)
    for one in hooks:
        one.remove()
    return min(margins) if margins else None


def changed_logits(path, settings, change, ids):
    """Logits with a change of the configuration, or of the weights."""
    if not callable(change) and "__buffers__" in change:
        model = load(path)
        for name, buffer in model.named_buffers():
            if name.endswith(change["__buffers__"]):
                buffer.data.zero_()
    elif callable(change):
        model = load(path)
        change(dict(model.named_parameters()))
    else:
        model = load(path, make_config({**settings, **change}))
    return forward(model, ids)


def write_v4(path, recipe):
    """config_v4.json: the keys that transformers 4 used, from config.json."""
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config", config)
    for key in ("rope_parameters", *recipe["remove"]):
        text.pop(key)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part["torch_dtype"] = part.pop("dtype")
    config["transformers_version"] = "4.51.3"
    text["rope_theta"] = recipe["rope_theta"]
    text["rope_scaling"] = recipe["old"]
    text.update(recipe["extra"])
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
        config["max_window_layers"] = 28
    (path / "config_v4.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_case(name):
    settings, length, recipe, shows, hidden = CASES[name]
    path = HERE / name
    path.mkdir(exist_ok=True)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    for attempt in range(50):
        generator = torch.Generator().manual_seed(seed + attempt)
        config = make_config(settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        fill(model, generator)
        ids = torch.randint(3, config.get_text_config().vocab_size - 3, (length,), generator=generator)
        model.save_pretrained(path)
        (path / "generation_config.json").unlink(missing_ok=True)

        model = load(path)
        logits = forward(model, ids)
        new, last, margin = greedy(model, ids[:PROMPT], NEW)
        experts = router_margin(model, [ids, torch.cat([ids[:PROMPT], new])])
        # Choices must not hang on rounding, and tokens should not repeat only.
        if margin > 0.02 and (experts is None or experts > 1e-2) and len(set(new.tolist())) >= 5:
            break
    else:
        raise SystemExit(f"{name}: no seed with clear margins")

    cached, cached_last = greedy_cached(load(path), ids[:PROMPT], NEW)
    # In one entry: safetensors writes several in an order of its own.
    metadata = {
        "about": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, F32, eager",
        "greedy_margin": round(margin, 4),
        "cached_difference": float(f"{float((cached_last - last).abs().max()):.2e}"),
    }
    if cached != new.tolist():
        metadata["cached_greedy"] = cached
    if experts is not None:
        metadata["router_margin"] = round(experts, 4)
    save_file({"input_ids": ids, "logits": logits, "greedy": new, "greedy_logits": last},
              path / "golden.safetensors", {"case": json.dumps(metadata)})

    report = []
    for about, change in shows.items():
        difference = float((changed_logits(path, settings, change, ids) - logits).abs().max())
        report.append(f"{about} {difference:.2g}")
        assert difference > SHOWS, f"{name}: {about} does not show ({difference})"
    for about, change in hidden.items():
        difference = float((changed_logits(path, settings, change, ids) - logits).abs().max())
        assert difference == 0, f"{name}: {about} shows ({difference})"
    if recipe is not None:
        write_v4(path, recipe)
    size = sum(f.stat().st_size for f in path.iterdir())
    print(f"{name}: attempt {attempt}, {size} bytes, std {float(logits.std()):.2f}, {metadata}; {', '.join(report)}")


def make_sparse(program):
    path = HERE / "llama_sparse24"
    path.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        out, plain = Path(scratch) / "out", Path(scratch) / "plain"
        subprocess.run([program, "convert", HERE / "llama", out, "--to", "sparse24:magnitude"], check=True)
        subprocess.run([program, "restore", out, plain], check=True)
        (shard,) = plain.glob("*.safetensors")
        (path / "model.safetensors").write_bytes(shard.read_bytes())
        (path / "config.json").write_bytes((plain / "config.json").read_bytes())
    for name, weight in load_file(path / "model.safetensors").items():
        if "_proj" in name:
            kept = (weight.view(-1, 4) != 0).sum(-1)
            assert int(kept.max()) == 2, name
    ids = load_file(HERE / "llama" / "golden.safetensors")["input_ids"]
    model = load(path)
    new, last, margin = greedy(model, ids[:PROMPT], NEW)
    assert margin > 1e-3, margin
    dense = load_file(HERE / "llama" / "golden.safetensors")["logits"]
    logits = forward(model, ids)
    assert float((logits - dense).abs().max()) > 0.1
    metadata = {
        "about": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, F32, eager",
        "greedy_margin": round(margin, 4),
    }
    save_file({"input_ids": ids, "logits": logits, "greedy": new, "greedy_logits": last},
              path / "golden.safetensors", {"case": json.dumps(metadata)})
    print(f"{path.name}: {metadata}")


MXFP4 = dict(model_type="gpt_oss", head_dim=16, num_local_experts=3, num_experts_per_tok=2, intermediate_size=32,
             sliding_window=8, layer_types=["full_attention"] * 2, num_hidden_layers=2, attention_bias=True,
             rope_parameters=DEFAULT_ROPE)


def make_mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = HERE.parent / "mxfp4" / "gpt_oss"
    path.mkdir(exist_ok=True, parents=True)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(MXFP4), dtype=torch.bfloat16)
        fill(model, generator)
        stored = {}
        for name, weight in model.named_parameters():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                continue
            experts, inputs, outputs = weight.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 125, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
            stored[name + "_blocks"], stored[name + "_scales"] = blocks, scales
            weight.data = convert_moe_packed_tensors(blocks, scales).to(torch.bfloat16)
            assert weight.shape == (experts, inputs, outputs)
        ids = torch.randint(3, model.config.vocab_size - 3, (40,), generator=generator)
        model.save_pretrained(path)
        (path / "generation_config.json").unlink(missing_ok=True)
        model = load(path)
        logits = forward(model, ids)
        new, last, margin = greedy(model, ids[:PROMPT], NEW)
        experts = router_margin(model, [ids, torch.cat([ids[:PROMPT], new])])
        if margin > 0.02 and experts > 1e-2 and len(set(new.tolist())) >= 5:
            break
    tensors = load_file(path / "model.safetensors")
    for name in stored:
        tensors.pop(name.rpartition("_")[0], None)
    save_file({**tensors, **stored}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    metadata = {
        "about": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, F32, eager",
        "greedy_margin": round(margin, 4),
        "router_margin": round(experts, 4),
    }
    save_file({"input_ids": ids, "logits": logits, "greedy": new, "greedy_logits": last},
              path / "golden.safetensors", {"case": json.dumps(metadata)})
    print(f"{path.name}: {metadata}")


def check_case(name):
    path = HERE / name
    golden = load_file(path / "golden.safetensors")
    with safe_open(path / "golden.safetensors", "pt") as f:
        metadata = json.loads(f.metadata()["case"])
    configs = ["config_v4.json"] if VERSION_4 else ["config.json", "config_v4.json"]
    line = []
    for file in configs:
        if not (path / file).exists():
            if not VERSION_4:
                continue
            file = "config.json"
        settings = json.loads((path / file).read_text())
        if VERSION_4 and file == "config.json":
            parameters = settings.pop("rope_parameters")
            settings["rope_theta"] = parameters.pop("rope_theta")
            settings["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
            if "partial_rotary_factor" in parameters:
                settings["partial_rotary_factor"] = parameters["partial_rotary_factor"]
            if settings["model_type"] == "qwen3_moe":
                settings["num_experts"] = settings["num_local_experts"]
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        differences = []
        for attention in ("eager", "sdpa"):
            model = load(path, config, attention)
            logits = forward(model, golden["input_ids"])
            differences.append(float((logits - golden["logits"]).abs().max()))
            new, last, _ = greedy(model, golden["input_ids"][:PROMPT], NEW)
            differences.append(float((last - golden["greedy_logits"]).abs().max()))
            assert torch.equal(new, golden["greedy"]), f"{name}: greedy, {attention}"
        assert max(differences) < 2e-5, f"{name}: {file} {differences}"
        line.append(f"{file} " + " ".join(f"{d:.1e}" for d in differences))
    size = sum(f.stat().st_size for f in path.iterdir())
    print(f"{name}: {size} bytes; {'; '.join(line)}; {metadata}")


LINEAR = {"rope_type": "linear", "factor": 4.0}
OLD_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD_LONGROPE = {"short_factor": SHORT, "long_factor": LONG}
# (case, changes): all that the model's own code may find in a published config.json.
FORMS = [
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4}),
    ("llama", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("llama", {"rope_parameters": None, "rope_theta": 2e4}),
    ("llama", {"rope_parameters": None}),
    ("llama", {"rope_parameters": {}}),
    ("llama", {"rope_parameters": rope("default", 2e4), "rope_theta": 3e4}),
    ("llama", {"rope_parameters": rope("default", 2e4), "rope_scaling": LINEAR}),
    ("llama", {"rope_parameters": rope("default", 2e4), "rope_scaling": LINEAR, "rope_theta": 3e4}),
    ("llama", {"rope_parameters": rope("default", 2e4), "rope_scaling": {**LINEAR, "rope_theta": 4e4}}),
    ("llama", {"rope_parameters": rope("default", 2e4), "rope_scaling": {}}),
    ("llama", {"rope_parameters": rope("linear", 2e4, factor=2.0), "rope_scaling": LINEAR}),
    ("llama", {"rope_parameters": {"type": "linear", "factor": 2.0}, "rope_theta": 2e4}),
    ("llama", {"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": 0.5}),
    ("llama", {"rope_parameters": rope("default", partial_rotary_factor=0.5)}),
    ("llama", {"rope_parameters": rope("linear", factor=2.0), "partial_rotary_factor": 0.5}),
    ("llama3_rope", {"rope_parameters": OLD_LLAMA3, "rope_theta": 2e4}),
    ("llama3_rope", {"rope_parameters": {**OLD_LLAMA3, "original_max_position_embeddings": 32},
                     "original_max_position_embeddings": 64}),
    ("llama_dynamic", {"rope_parameters": {}, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 2e4}),
    ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 2e3}),
    ("mistral", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("qwen2", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("qwen2_sliding", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4}),
    ("qwen2_sliding", {"rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": DEFAULT_ROPE}}),
    ("qwen3", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4}),
    ("qwen3", {"rope_parameters": {}}),
    ("qwen3_moe", {"rope_parameters": {}, "rope_scaling": LINEAR, "rope_theta": 2e4}),
    ("mixtral", {"rope_parameters": {}}),
    ("mixtral", {"rope_parameters": None, "rope_scaling": LINEAR}),
    ("phi3", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("phi3", {"rope_parameters": DEFAULT_ROPE, "partial_rotary_factor": 0.5}),
    ("phi3", {"rope_parameters": {}, "partial_rotary_factor": 0.5}),
    ("phi3_longrope", {"rope_parameters": {}, "rope_scaling": {"type": "su", **OLD_LONGROPE},
                       "partial_rotary_factor": 0.75, "rope_theta": 2e4}),
    ("phi3_longrope", {"rope_parameters": None, "rope_scaling": {"type": "yarn", **OLD_LONGROPE},
                       "partial_rotary_factor": 0.75}),
    ("gemma3_text", {"rope_parameters": None}),
    ("gemma3_text", {"rope_parameters": {}}),
    ("gemma3_text", {"rope_parameters": {}, "rope_theta": 2e5, "rope_local_base_freq": 2e4}),
    ("gemma3_text", {"rope_parameters": LINEAR, "rope_theta": 2e5}),
    ("gemma3_text", {"rope_parameters": rope("linear", 2e4, factor=4.0)}),
    ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR}, "rope_theta": 2e5, "rope_local_base_freq": 2e4}),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": LINEAR}}),
    ("gemma3_text", {"rope_parameters": {"full_attention": None, "sliding_attention": {}}, "rope_theta": 2e5}),
    ("gemma3_text", {"rope_parameters": {"full_attention": rope("default", 1e6), "sliding_attention": DEFAULT_ROPE},
                     "rope_scaling": LINEAR}),
    ("gemma3_text", {"rope_parameters": {"full_attention": rope("default", 1e6), "sliding_attention": DEFAULT_ROPE},
                     "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("gemma3_text", {"rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 2e5}),
    ("gemma3_text", {"rope_parameters": {}, "rope_scaling": LINEAR}),
    ("gemma3_multimodal", {"rope_parameters": {}, "rope_theta": 2e5, "rope_local_base_freq": 2e4}),
    ("gemma3_multimodal", {"rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 2e5}),
    ("gemma3_multimodal", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 2e4}}}),
    ("smollm3", {"rope_parameters": {}}),
    ("smollm3", {"rope_parameters": {}, "rope_theta": 2e5}),
    ("granite", {"rope_parameters": {}, "rope_scaling": LINEAR, "rope_theta": 2e4}),
    ("olmo2", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("olmo3", {"rope_parameters": None}),
    ("olmo3", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("olmo3", {"rope_parameters": None, "rope_scaling": LINEAR}),
    ("olmo3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 2e4}}}),
    ("gemma2", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("cohere2", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("glm4", {"rope_parameters": {}, "rope_theta": 2e4}),
    ("glm4", {"rope_parameters": {}, "rope_theta": 2e4, "partial_rotary_factor": 0.25}),
    ("glm4", {"rope_parameters": DEFAULT_ROPE}),
    ("starcoder2", {"rope_parameters": {}, "rope_theta": 2e4}),
]


def make_form(name, changes):
    path = HERE / name
    ids = load_file(path / "golden.safetensors")["input_ids"]
    settings = json.loads((path / "config.json").read_text())
    text = settings.get("text_config", settings)
    for key, value in changes.items():
        text.pop(key, None) if value is None else text.__setitem__(key, copy.deepcopy(value))
    form = {"case": name, "changes": changes}
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        logits = forward(load(path, config), ids)[-1]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return {**form, "refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**form, "logits": [float(f"{v:.7g}") for v in logits]}


def make_forms():
    forms = [make_form(*form) for form in FORMS]
    about = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, F32, eager"
    lines = ",\n".join("  " + json.dumps(form) for form in forms)
    (HERE / "rope_forms.json").write_text(f'{{"about": {json.dumps(about)}, "forms": [\n{lines}\n]}}\n')
    for form in forms:
        print(form["case"], form["changes"], form.get("refused", "runs"))


def nll(logits, ids):
    """Negative log likelihoods of ids[1:], in F64."""
    chosen = logits[:-1].double().log_softmax(-1).gather(1, ids[1:, None])
    return -chosen[:, 0]


def make_real(spec):
    name, _, rest = spec.partition("=")
    folder, _, text_file = rest.partition(":")
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    text = Path(text_file).read_bytes()
    # Far more than 8,192 tokens; cut at a line so that no token is split.
    part = text[:200_000].decode("utf-8", "ignore")
    if len(text) > 200_000:
        part = part[: part.rindex("\n") + 1]
    all_ids = tokenizer.encode(part, add_special_tokens=False).ids[:8192]
    assert len(all_ids) == 8192
    ids = torch.tensor(all_ids)

    model = load(folder, attention="sdpa")
    logits = forward(model, ids[:64])
    last = logits[-1].double()
    top = last.topk(10)
    margin, new, out = math.inf, [], None
    with torch.inference_mode():
        out = model(input_ids=ids[None, :16], use_cache=True)
        for _ in range(32):
            step = out.logits[0, -1]
            best = step.topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            new.append(int(best.indices[0]))
            out = model(input_ids=torch.tensor([[new[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    windows = [float(nll(forward(model, w), w).sum()) for w in ids.split(512)]
    mean = sum(windows) / (511 * len(windows))
    digits = lambda values: [round(float(v), 6) for v in values]
    return name, {
        "text": Path(text_file).name,
        "text_bytes": len(text),
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "ids_sha256": hashlib.sha256(struct.pack("<8192I", *all_ids)).hexdigest(),
        "ids": all_ids[:64],
        "top": {"ids": top.indices.tolist(), "logits": digits(top.values)},
        "first": digits(last[:16]),
        "logsumexp": round(float(last.logsumexp(0)), 6),
        "mean": round(float(last.mean()), 6),
        "nll": digits(nll(logits, ids[:64])),
        "greedy": new,
        "greedy_margin": round(margin, 4),
        "windows": digits(w / 511 for w in windows),
        "mean_nll": round(mean, 8),
        "perplexity": round(math.exp(mean), 6),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("cases", "check"):
        commands.add_parser(command).add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    commands.add_parser("sparse").add_argument("program", metavar="LLMPRESS")
    commands.add_parser("forms")
    commands.add_parser("mxfp4")
    commands.add_parser("real").add_argument("model", nargs="+", metavar="NAME=MODEL_DIR:TEXT")
    arguments = parser.parse_args()
    if arguments.command == "real":
        file = HERE / "real.json"
        models = json.loads(file.read_text()) if file.exists() else {}
        models["about"] = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, F32, SDPA"
        for spec in arguments.model:
            name, values = make_real(spec)
            models[name] = values
            print(name, values["perplexity"], file=sys.stderr)
        # One line a value, lists included.
        lines = [f' {json.dumps(n)}: ' + (json.dumps(m) if n == "about" else "{\n" + ",\n".join(
            f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in m.items()) + "\n }") for n, m in models.items()]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    if arguments.command == "sparse":
        make_sparse(arguments.program)
        return
    if arguments.command == "mxfp4":
        make_mxfp4()
        return
    if arguments.command == "forms":
        make_forms()
        return
    for name in arguments.case:
        (make_case if arguments.command == "cases" else check_case)(name)


if __name__ == "__main__":
    main()
