#!/usr/bin/env python3
"""Writes the small files of torch that `torch.rs` reads, by torch itself.

    python make_torch.py

Needs torch 2, numpy and safetensors.
"""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def directory(name):
    path = HERE / name
    path.mkdir(exist_ok=True)
    return path


def every_dtype():
    torch.manual_seed(3)
    numbers = torch.randn(6, 4)
    tensors = OrderedDict()
    for dtype in ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"):
        tensors[f"of.{dtype}"] = numbers.to(getattr(torch, dtype))
    for dtype in ("int64", "int32", "int16", "int8", "uint8", "bool"):
        tensors[f"of.{dtype}"] = (numbers * 50).clamp(min=0).to(getattr(torch, dtype))
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 7)
    tensors["rows"] = numbers[2:5]
    tensors["one.column"] = numbers[:, :1].contiguous().expand(6, 1)
    return tensors


class Runs:
    """What a state dict must not be."""

    def __reduce__(self):
        return os.system, ("echo it ran > /tmp/it-ran",)


def replace_pickle(path, content):
    """The same archive with another pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, bytes in entries:
            archive.writestr(name, content if name.endswith("data.pkl") else bytes)


def main():
    tensors = every_dtype()
    single = directory("single")
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    # A state dict of a module brings metadata, and parameters are tensors too.
    state = module.state_dict()
    state.update(tensors)
    state["parameter"] = module.bias
    torch.save(state, single / "pytorch_model.bin")
    expected = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    save_file(expected, single / "expected.safetensors")
    shared = directory("shared")
    weight = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    torch.save({"model.embed_tokens.weight": weight, "lm_head.weight": weight}, shared / "pytorch_model.bin")
    parts = directory("parts")
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save({"a.weight": weight}, parts / files[0])
    torch.save({"b.weight": weight + 1}, parts / files[1])
    index = {"metadata": {"total_size": 48}, "weight_map": {"a.weight": files[0], "b.weight": files[1]}}
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")
    refused = directory("refused")
    torch.save({"w": weight.t()}, refused / "transposed.bin")
    torch.save({"w": weight, "epoch": 3}, refused / "number.bin")
    torch.save({"model": {"w": weight}}, refused / "nested.bin")
    torch.save([weight], refused / "list.bin")
    torch.save({"w": weight}, refused / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"w": weight}, refused / "runs.bin")
    replace_pickle(refused / "runs.bin", pickle.dumps({"w": Runs()}, protocol=2))
    torch.save({"w": torch.nn.Linear(1, 1)}, refused / "module.bin")
    for path in HERE.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
