#!/usr/bin/env python3
"""Decompresses what `llmpress export --as compressed-tensors` wrote with the package that made the format, and compares every
weight bit for bit with what `llmpress restore` makes of the same checkpoint.

    llmpress export OUT EXPORTED --as compressed-tensors
    llmpress restore OUT PLAIN
    python check_export.py EXPORTED PLAIN

Needs compressed-tensors 0.20.0 (with torch and transformers) and safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open


def tensors(directory):
    found = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def main(exported, plain):
    config = json.loads((Path(exported) / "config.json").read_text())
    # The package's own parser: what it does not take is an error here.
    config = QuantizationConfig.model_validate(config["quantization_config"])
    ours, expected = tensors(exported), tensors(plain)
    compressor = {
        "pack-quantized": PackedQuantizationCompressor,
        "int-quantized": IntQuantizationCompressor,
    }[config.format]
    modules = sorted(name.removesuffix(".weight_scale") for name in ours if name.endswith(".weight_scale"))
    for module in modules:
        named = [group for group in config.config_groups.values() if module in group.targets]
        scheme = (named or [group for group in config.config_groups.values() if "Linear" in group.targets])[0]
        names = compressor.compression_param_names(scheme)
        state = {name: ours.pop(f"{module}.{name}") for name in names}
        ours[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"]
    assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        # Bits count, not values: but for the sign of a zero, which an integer does not have.
        same = (ours[name] == tensor) | (ours[name].isnan() & tensor.isnan())
        assert bool(same.all()), f"{name}: {int((~same).sum())} weights differ"
    print(f"{len(modules)} quantised modules of {len(expected)} tensors: the same numbers")


if __name__ == "__main__":
    main(*sys.argv[1:3])
