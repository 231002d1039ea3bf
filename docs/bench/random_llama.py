#!/usr/bin/env python3
"""Makes a checkpoint with the matrices of Llama 3 8B and random weights, for measuring speed and memory.

    python random_llama.py DIR [--layers 32] [--seed 0] [--threads N]
        [--hidden 4096] [--intermediate 14336] [--heads 32] [--kv-heads 8] [--vocab 128256]

Writes DIR/config.json and DIR/model.safetensors: matrices of normal numbers with a deviation of 0.02, rounded to BF16
(about as many exponents as trained weights have), norms of ones. The bytes depend on the arguments alone, not on the
number of threads. With 8 layers the file has 5.6 GB, with 32 it has 16.1 GB; memory stays at a matrix a thread. There
is no tokenizer: `llmpress speed` needs none.

Python 3.11 or newer, and:

    pip install numpy==2.3.5
"""

import argparse
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

DEVIATION = 0.02
# Weights that are made at a time.
PIECE = 1 << 22


def tensors(a):
    """Name and shape of each tensor, in the order of the file."""
    head = a.hidden // a.heads
    yield "model.embed_tokens.weight", (a.vocab, a.hidden)
    for layer in range(a.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (a.hidden,)
        yield prefix + "post_attention_layernorm.weight", (a.hidden,)
        for name, rows in (("q", a.heads * head), ("k", a.kv_heads * head), ("v", a.kv_heads * head)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, a.hidden)
        yield prefix + "self_attn.o_proj.weight", (a.hidden, a.heads * head)
        yield prefix + "mlp.gate_proj.weight", (a.intermediate, a.hidden)
        yield prefix + "mlp.up_proj.weight", (a.intermediate, a.hidden)
        yield prefix + "mlp.down_proj.weight", (a.hidden, a.intermediate)
    yield "model.norm.weight", (a.hidden,)
    yield "lm_head.weight", (a.vocab, a.hidden)


def bf16(values):
    """To the nearest BF16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def write(file, offset, shape, seed):
    """Writes a tensor where it belongs."""
    if len(shape) == 1:
        os.pwrite(file, bf16(np.ones(shape, np.float32)).tobytes(), offset)
        return
    random = np.random.Generator(np.random.PCG64(seed))
    count = math.prod(shape)
    for first in range(0, count, PIECE):
        values = random.standard_normal(min(PIECE, count - first), dtype=np.float32)
        values *= np.float32(DEVIATION)
        data = memoryview(bf16(values).tobytes())
        at = offset + 2 * first
        while data:
            written = os.pwrite(file, data, at)
            data, at = data[written:], at + written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    a = parser.parse_args()

    header, places, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, shape in tensors(a):
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        places.append((start, shape))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    a.dir.mkdir(parents=True, exist_ok=True)
    with open(a.dir / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        first = file.tell()
        file.truncate(first + end)
        seeds = np.random.SeedSequence(a.seed).spawn(len(places))
        with ThreadPoolExecutor(a.threads) as pool:
            jobs = [
                pool.submit(write, file.fileno(), first + start, shape, seed)
                for (start, shape), seed in zip(places, seeds)
            ]
            for job in jobs:
                job.result()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.hidden // a.heads,
        "vocab_size": a.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (a.dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
