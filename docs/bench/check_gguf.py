#!/usr/bin/env python3
"""Reads what `llmpress export --as gguf` writes with the package that defines the format, and compares every weight with what
`llmpress export --as safetensors` makes of the same checkpoint. In one command, from the root of the repository:

    python docs/bench/check_gguf.py --model examples/tinylm --llmpress target/release/llmpress

which quantises, exports and restores the model (a Llama in BF16) as every type of blocks. Python 3.11 or newer, and:

    pip install gguf==0.19.0 numpy
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf_q4_0 import name_of, tensors, turned

# None is the model as it is.
SETTINGS = [
    None,
    "rtn:w4,g32,symmetric",
    "rtn:w3,symmetric",
    "rtn:w2*,g128,symmetric",
    "rtn:w4,g64,int",
    "rtn:w5,g32,symmetric",
    "rtn:w8,g32,symmetric",
    "rtn:w6,g64,int",
]


def bf16(values):
    """The nearest BF16, of two the even one, as bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def compare(file, plain):
    """Compares every tensor; the types that there were, in words."""
    reader = gguf.GGUFReader(file)
    heads, kv_heads = (int(reader.fields[f"llama.attention.head_count{kind}"].contents()) for kind in ("", "_kv"))
    written = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {}
    for name, expected in tensors(plain):
        target, _ = name_of(name)
        tensor = written.pop(target)
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        if "q_proj" in name or "k_proj" in name:
            expected = turned(expected, heads if "q_proj" in name else kv_heads)
        same = bf16(found) == bf16(expected)
        assert same.all(), f"{name}: {int((~same).sum())} weights differ"
    assert not written, f"{list(written)} are in the file alone"
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a plain checkpoint of a Llama in BF16")
    parser.add_argument("--llmpress", default="llmpress", help="the program")
    args = parser.parse_args()
    assert json.loads((args.model / "config.json").read_text())["model_type"] == "llama"
    with tempfile.TemporaryDirectory() as work:
        ours, exported, plain = (Path(work) / name for name in ["ours", "exported", "plain"])
        run = lambda *words: subprocess.run([args.llmpress, "--quiet", *map(str, words)], check=True)
        for setting in SETTINGS:
            source = args.model
            if setting:
                run("convert", args.model, ours, "--to", setting, "--force")
                source = ours
            run("export", source, exported, "--as", "gguf", "--force")
            run("export", source, plain, "--as", "safetensors", "--force")
            (file,) = exported.glob("*.gguf")
            print(f"{setting or 'as it is'}: {compare(file, plain / 'model.safetensors')}: the same numbers", flush=True)


if __name__ == "__main__":
    main()
