#!/usr/bin/env python3
"""Writes the small quantised checkpoints that `foreign.rs` reads, by the packages that made their formats.

    python make_foreign.py AUTO_GPTQ AUTOAWQ

AUTO_GPTQ and AUTOAWQ are the unpacked sources of auto-gptq 0.7.1 and autoawq 0.2.9, of which one file each is loaded: neither
installs without CUDA. Besides: compressed-tensors 0.20.0, torch 2, transformers 5, safetensors, numpy.

Each directory has a `config.json`, a `model.safetensors`, and in `expected.safetensors` what the package itself dequantises it to.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

HERE = Path(__file__).parent
MODULE = "model.layers.0.self_attn.q_proj"
ROWS, COLS = 64, 96


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(name, config, tensors, expected):
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    config = {"model_type": "llama", "hidden_size": COLS, "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {f"{MODULE}.{key}": value.contiguous() for key, value in tensors.items()}
    tensors["model.norm.weight"] = torch.arange(COLS, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_file({f"{MODULE}.weight": expected.contiguous()}, directory / "expected.safetensors")


def grid(weight, bits, groups, symmetric, dtype):
    """Scales and integer zero points (signed) of a matrix by groups, from its extremes."""
    parts = weight.reshape(weight.shape[0], groups, -1).float()
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5)
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (2**bits - 1)
        zero = (-(2 ** (bits - 1)) - low / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return scale.to(dtype), zero.to(torch.int8)


def compressed_tensors(name, weight, bits, group_size, symmetric, compressor, inputs=None):
    groups = 1 if group_size is None else COLS // group_size
    scale, zero = grid(weight, bits, groups, symmetric, weight.dtype)
    strategy = "channel" if group_size is None else "group"
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    packed = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"]
    pack = compressor is PackedQuantizationCompressor
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if pack else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    write(name, config, packed, expected)


def gptq(name, qlinear, weight, bits, group_size, index=None):
    groups = COLS // group_size
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    linear.weight.data = weight.float()
    order = torch.arange(COLS) if index is None else torch.argsort(index, stable=True)
    scale, zero = grid(weight[:, order], bits, groups, False, torch.float16)
    # Version 1 stores zero - 1: the lowest is 1.
    zero = (zero.int() + 2 ** (bits - 1)).clamp(1, 2**bits - 1).float()
    layer = qlinear.QuantLinear(bits, group_size, COLS, ROWS, False, weight_dtype=torch.float16)
    # It packs what rounds into the range and does not clamp.
    by_column = (torch.arange(COLS) // group_size) if index is None else index
    s, z = scale.float()[:, by_column], zero[:, by_column]
    codes = (weight.float() / s + z).round().clamp(0, 2**bits - 1)
    linear.weight.data = s * (codes - z)
    layer.pack(linear, scale.float(), zero, None if index is None else index.int())
    layer.scales = layer.scales.half()
    expected = layer(torch.eye(COLS).half()).t()
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": index is not None, "sym": False}
    keys = ["qweight", "qzeros", "scales", "g_idx"]
    write(name, config, {key: getattr(layer, key) for key in keys}, expected)


def awq(name, packing, weight, group_size):
    groups = COLS // group_size
    scale, zero = grid(weight, 4, groups, False, torch.float16)
    zero = (zero.int() + 8).clamp(0, 15)
    codes = (weight.float() / scale.float().repeat_interleave(group_size, 1)).round() + zero.repeat_interleave(group_size, 1)
    codes = codes.clamp(0, 15).int().t().numpy().astype(np.uint32)

    def pack(values):
        """Eight outputs a word, in the package's order."""
        words = values.reshape(values.shape[0], -1, 8)[:, :, packing.AWQ_ORDER]
        shifts = np.arange(8, dtype=np.uint32) * 4
        return torch.from_numpy(np.ascontiguousarray((words << shifts).sum(-1, dtype=np.uint32).astype(np.int32)))

    qweight, qzeros = pack(codes), pack(zero.t().numpy().astype(np.uint32))
    scales = scale.t().contiguous()
    expected = packing.dequantize_gemm(qweight, qzeros, scales, 4, group_size).t()
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    write(name, config, {"qweight": qweight, "qzeros": qzeros, "scales": scales}, expected)


def main():
    torch.manual_seed(7)
    weight = (torch.randn(ROWS, COLS) * torch.rand(ROWS, 1)).to(torch.bfloat16)
    dynamic = QuantizationArgs(num_bits=8, symmetric=False, strategy="token", dynamic=True)
    pack, whole = PackedQuantizationCompressor, IntQuantizationCompressor
    compressed_tensors("pack-w4-g32", weight, 4, 32, False, pack)
    compressed_tensors("pack-w3-sym", weight, 3, None, True, pack)
    compressed_tensors("pack-w5-a8", weight.half(), 5, None, False, pack, dynamic)
    compressed_tensors("int-w8-a8", weight, 8, None, True, whole, dynamic)
    qlinear = load(Path(sys.argv[1]) / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear")
    for bits in (2, 3, 4, 8):
        gptq(f"gptq-w{bits}", qlinear, weight, bits, 32)
    index = torch.randperm(COLS) // 32
    gptq("gptq-act-order", qlinear, weight, 4, 32, index)
    packing = load(Path(sys.argv[2]) / "awq/utils/packing_utils.py", "packing")
    awq("awq-g32", packing, weight, 32)


if __name__ == "__main__":
    main()
