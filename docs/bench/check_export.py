#!/usr/bin/env python3
"""Decompresses what `llmpress export --as compressed-tensors` writes with the package that made the format, and compares every
weight with what `llmpress restore` makes of the same checkpoint. In one command, from the root of the repository:

    python docs/bench/check_export.py --model examples/tinylm --llmpress target/release/llmpress

which quantises, exports and restores the model in every way that the formats have. What is there already is compared by

    python docs/bench/check_export.py EXPORTED PLAIN

Needs compressed-tensors 0.20.0 (it brings torch and transformers) and safetensors 0.8.0.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open

# By rows and groups, symmetric (with scales of either sign from a search) and with zero points, five levels as three bits; with
# quantised inputs; and signed bytes.
SETTINGS = [
    "rtn:w4,g128,symmetric",
    "grid:w2,symmetric",
    "grid:w3,g32,symmetric",
    "rtn:w4,g64,int",
    "rtn:w8,int",
    "rtn:w2*,g128,symmetric",
    "rtn:w5a8,symmetric",
    "rtn:w8a8,symmetric",
    "rtn:w8a8,int",
]


def tensors(directory):
    found = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def compare(exported, plain):
    """Decompresses and compares; what was compared, in words."""
    config = json.loads((Path(exported) / "config.json").read_text())
    # The package's own parser: what it does not take is an error here.
    config = QuantizationConfig.model_validate(config["quantization_config"])
    ours, expected = tensors(exported), tensors(plain)
    compressor = {
        "pack-quantized": PackedQuantizationCompressor,
        "int-quantized": IntQuantizationCompressor,
    }[config.format]
    modules = sorted(name.removesuffix(".weight_scale") for name in ours if name.endswith(".weight_scale"))
    assert modules, "nothing is quantised"
    below = 0
    for module in modules:
        named = [group for group in config.config_groups.values() if module in group.targets]
        scheme = (named or [group for group in config.config_groups.values() if "Linear" in group.targets])[0]
        names = compressor.compression_param_names(scheme)
        below += int((ours[f"{module}.weight_scale"] < 0).sum())
        state = {name: ours.pop(f"{module}.{name}") for name in names}
        ours[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"]
    assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        # Bits count, not values: but for the sign of a zero, which an integer does not have.
        same = (ours[name] == tensor) | (ours[name].isnan() & tensor.isnan())
        assert bool(same.all()), f"{name}: {int((~same).sum())} weights differ"
    return f"{config.format}: {len(modules)} quantised modules of {len(expected)} tensors, {below} scales below zero: the same numbers"


def make(llmpress, model, setting, work):
    """What llmpress exports, and the plain checkpoint beside it."""
    ours, exported, plain = (str(work / name) for name in ["ours", "exported", "plain"])
    run = lambda *args: subprocess.run([llmpress, "--quiet", *args], check=True)
    run("convert", model, ours, "--to", setting, "--force")
    run("export", ours, exported, "--as", "compressed-tensors", "--force")
    run("restore", ours, plain, "--force")
    return exported, plain


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="*", metavar="EXPORTED PLAIN")
    parser.add_argument("--model", help="a plain checkpoint to go through every setting with")
    parser.add_argument("--llmpress", default="llmpress", help="the program")
    args = parser.parse_args()
    if args.model and not args.directories:
        with tempfile.TemporaryDirectory() as work:
            for setting in SETTINGS:
                print(f"{setting}: {compare(*make(args.llmpress, args.model, setting, Path(work)))}", flush=True)
    elif len(args.directories) == 2 and not args.model:
        print(compare(*args.directories))
    else:
        parser.error("give either --model, or an export and a plain checkpoint")


if __name__ == "__main__":
    main()
