#!/usr/bin/env python3
"""Makes an FP8 checkpoint of a BF16 one, with the scales that compressed-tensors takes.

    python make_fp8.py MODEL OUT [--strategy channel|tensor]

Matrices of all linears but the head become F8_E4M3 with a BF16 scale a row (channel) or a matrix (tensor), calculated and cast by
compressed-tensors' own functions; the rest stays as it is. OUT is loaded by vLLM and transformers, and by llmpress.

    pip install compressed-tensors==0.20.0 safetensors==0.8.0
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", choices=["channel", "tensor"], default="channel")
    args = parser.parse_args()
    args.out.mkdir()
    settings = QuantizationArgs(num_bits=8, type="float", strategy=args.strategy, symmetric=True)
    for file in args.model.iterdir():
        if file.suffix == ".safetensors":
            tensors = {}
            for name, tensor in load_file(file).items():
                if not name.endswith("_proj.weight"):
                    tensors[name] = tensor
                    continue
                dim = 1 if settings.strategy == QuantizationStrategy.CHANNEL else (0, 1)
                least, most = tensor.amin(dim, keepdim=True), tensor.amax(dim, keepdim=True)
                scale, zero = calculate_qparams(least, most, settings)
                scale = scale.reshape(-1, 1) if dim == 1 else scale.reshape(1)
                tensors[name] = quantize(tensor, scale, zero.reshape(scale.shape), settings, dtype=torch.float8_e4m3fn)
                tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
            save_file(tensors, args.out / file.name, metadata={"format": "pt"})
        elif file.is_file() and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, args.out / file.name)
    config = json.loads((args.model / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": args.strategy, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
