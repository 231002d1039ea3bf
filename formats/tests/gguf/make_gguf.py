#!/usr/bin/env python3
"""Writes the small GGUF files that the tests read, by the package that defines the format.

    python make_gguf.py

Needs gguf 0.19, numpy and safetensors.

`blocks.gguf` has a matrix of every type, `expected.safetensors` what the package dequantises them to. `models/` holds the checkpoints of
`model/tests/golden` under the package's names, with the rows and norms that llama.cpp's converter gives them.
"""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType as Type
from safetensors.numpy import save_file

HERE = Path(__file__).parent
GOLDEN = HERE.parents[2] / "model/tests/golden"
ROWS, COLS = 3, 512


def half(value):
    return np.float16(value).tobytes()


def block(kind, rng):
    """A block of random codes whose scales are no extremes."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    raw = bytearray(rng.integers(0, 256, size, dtype=np.uint8).tobytes())
    scale = lambda: half(rng.normal() * 2.0 ** rng.integers(-8, 2))
    places = {
        Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
        Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
    }  # fmt: skip
    for place in places.get(kind, []):
        raw[place : place + 2] = scale()
    if kind == Type.MXFP4:
        raw[0] = rng.integers(0, 3) if rng.integers(0, 4) == 0 else rng.integers(100, 140)
    return bytes(raw)


def blocks():
    rng = np.random.default_rng(5)
    kinds = [
        Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0,
        Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4,
    ]  # fmt: skip
    writer = gguf.GGUFWriter(HERE / "blocks.gguf", "qwen3")
    writer.add_block_count(len(kinds))
    writer.add_embedding_length(COLS)
    writer.add_feed_forward_length(ROWS)
    writer.add_head_count(4)
    expected = {}
    for layer, kind in enumerate(kinds):
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        if kind in (Type.F32, Type.F16):
            dtype = np.float32 if kind == Type.F32 else np.float16
            data = rng.normal(size=(ROWS, COLS)).astype(dtype)
            decoded = data.astype(np.float32)
        else:
            if kind == Type.BF16:
                raw = gguf.quants.quantize(rng.normal(size=(ROWS, COLS)).astype(np.float32), kind).tobytes()
            else:
                raw = b"".join(block(kind, rng) for _ in range(ROWS * COLS // weights))
            data = np.frombuffer(raw, np.uint8).reshape(ROWS, COLS // weights * size)
            decoded = gguf.quants.dequantize(data, kind)
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", np.ascontiguousarray(data), raw_dtype=kind)
        expected[f"model.layers.{layer}.mlp.up_proj.weight"] = np.ascontiguousarray(decoded, np.float32)
    finish(writer)
    save_file(expected, HERE / "expected.safetensors")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(path):
    """The BF16 tensors of a safetensors file in single precision."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        assert entry["dtype"] == "BF16"
        begin, end = (8 + length + at for at in entry["data_offsets"])
        words = np.frombuffer(raw[begin:end], np.uint16).astype(np.uint32) << 16
        yield name, words.view(np.float32).reshape(entry["shape"])


def interleave(rows, heads):
    """The halves of each head take turns, as llama.cpp's converter has them for architectures that it runs as Llama."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def rotary(writer, config, head_dim):
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] == "llama3":
        length = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        smooth = (original / length - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors = np.where(length < original / high, 1, np.where(length > original / low, rope["factor"], between))
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def model(name, arch):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    writer = gguf.GGUFWriter(HERE / f"models/{name}.gguf", gguf.MODEL_ARCH_NAMES[arch])
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("layer_types"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    rotary(writer, config, head_dim)
    names = gguf.get_tensor_name_map(arch, layers)
    stacks = {}
    for full, weight in tensors(GOLDEN / name / "model.safetensors"):
        stem, last = full.rsplit(".", 1)
        parts = stem.split(".")
        if "experts" in parts:
            at = parts.index("experts")
            stacks.setdefault(".".join(parts[: at + 1] + parts[at + 2 :]) + f".{last}", {})[int(parts[at + 1])] = weight
            continue
        add(writer, names, arch, config, full, weight)
    for full, experts in stacks.items():
        add(writer, names, arch, config, full, np.stack([experts[at] for at in range(len(experts))]))
    finish(writer)


def add(writer, names, arch, config, full, weight):
    stem, last = full.rsplit(".", 1)
    # Layers without experts among others have the names of the architecture without any.
    dense = gguf.get_tensor_name_map(MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    name = f"{names.get_name(stem) or dense.get_name(stem)}.{last}"
    if arch == MODEL_ARCH.LLAMA and (".q_proj." in full or ".k_proj." in full):
        weight = interleave(weight, config["num_attention_heads" if ".q_proj." in full else "num_key_value_heads"])
    if arch == MODEL_ARCH.GEMMA3 and stem.endswith("norm"):
        weight = weight + np.float32(1)
    if weight.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(weight, np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(weight), Type.BF16), raw_dtype=Type.BF16)


def main():
    blocks()
    (HERE / "models").mkdir(exist_ok=True)
    model("llama", MODEL_ARCH.LLAMA)
    model("llama_bias", MODEL_ARCH.LLAMA)
    model("llama3_rope", MODEL_ARCH.LLAMA)
    model("llama_linear", MODEL_ARCH.LLAMA)
    model("mixtral", MODEL_ARCH.LLAMA)
    model("qwen2", MODEL_ARCH.QWEN2)
    model("qwen3", MODEL_ARCH.QWEN3)
    model("qwen3_moe", MODEL_ARCH.QWEN3MOE)
    model("gemma3_text", MODEL_ARCH.GEMMA3)
    model("phi3_longrope", MODEL_ARCH.PHI3)


if __name__ == "__main__":
    main()
