#!/usr/bin/env python3
"""Writes a Llama checkpoint as a GGUF file that llama.cpp runs: the peer of a model of few bits.

    python gguf_q4_0.py MODEL_DIR OUT.gguf [--linears Q4_0] [--head Q8_0]

The linears of the blocks become one type, the embedding (which is the head too, where they are tied) another: what llama.cpp's own
tool makes of SmolLM2 with Q4_0, whose rows of 576 fit no K-quant. Rows of q and k are put in the order in which llama.cpp turns them.
Prints the bytes of both. MODEL_DIR has model.safetensors (BF16), config.json and tokenizer.json of a byte-level BPE. Python 3.11 or newer, and:

    pip install gguf==0.19.0 numpy
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(path):
    """The tensors of a file, in F32."""
    data = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        words = data[8 + size + begin : 8 + size + end].view(np.uint16).astype(np.uint32) << 16
        yield name, words.view(np.float32).reshape(entry["shape"])


def turned(weights, heads):
    """Halves of each head's rows in turn, as llama.cpp rotates pairs that lie side by side."""
    rows, cols = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def name_of(name):
    """llama.cpp's name, and whether it is a linear of a block."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight", False
    if name == "model.norm.weight":
        return "output_norm.weight", False
    if name == "lm_head.weight":
        return "output.weight", False
    _, _, layer, rest = name.split(".", 3)
    module = rest.removesuffix(".weight")
    return f"blk.{layer}.{NAMES[module]}.weight", module.endswith("_proj")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--linears", default="Q4_0")
    parser.add_argument("--head", default="Q8_0")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit("only the Llama architecture is written")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((args.model / "tokenizer.json").read_text())
    vocabulary = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    vocabulary.update((entry["id"], entry["content"]) for entry in tokenizer["added_tokens"])
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([vocabulary.get(id, f"[unused {id}]") for id in ids])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if id in special else kinds.NORMAL if id in vocabulary else kinds.UNUSED for id in ids])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    bytes_of = {"linears": 0, "head": 0}
    types = {kind: getattr(gguf.GGMLQuantizationType, getattr(args, kind)) for kind in bytes_of}
    for name, weights in tensors(args.model / "model.safetensors"):
        target, is_linear = name_of(name)
        if "q_proj" in name or "k_proj" in name:
            weights = turned(weights, heads if "q_proj" in name else kv_heads)
        if weights.ndim == 1:
            writer.add_tensor(target, weights)
            continue
        kind = "linears" if is_linear else "head"
        packed = quantize(np.ascontiguousarray(weights), types[kind])
        bytes_of[kind] += packed.nbytes
        writer.add_tensor(target, packed, raw_dtype=types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(json.dumps({"linears": args.linears, "linear_bytes": bytes_of["linears"], "head": args.head, "head_bytes": bytes_of["head"]}))


if __name__ == "__main__":
    main()
