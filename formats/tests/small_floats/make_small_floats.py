#!/usr/bin/env python3
"""Writes the small checkpoints of FP8, NVFP4 and MXFP4 that `small_floats.rs` reads, by the packages that made their layouts.

    python make_small_floats.py MODELOPT

MODELOPT is the unpacked wheel of nvidia-modelopt 0.47.0, of which two files are loaded by themselves. Besides: compressed-tensors
0.20.0, torch 2, transformers 5, safetensors.

Each directory has a `config.json`, a `model.safetensors`, and in `expected.safetensors` what the package itself dequantises it to.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).parent
MODULE = "model.layers.0.self_attn.q_proj"
ROWS, COLS = 64, 96


def write(name, config, tensors, expected, tensor=f"{MODULE}.weight", files=None, **more):
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    whole = {"model_type": "llama", "hidden_size": COLS, **more}
    if config is not None:
        whole["quantization_config"] = config
    (directory / "config.json").write_text(json.dumps(whole, indent=1) + "\n")
    for file, content in (files or {}).items():
        (directory / file).write_text(json.dumps(content, indent=1) + "\n")
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    tensors["model.norm.weight"] = torch.arange(COLS, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_file({tensor: expected.contiguous()}, directory / "expected.safetensors")


def fine_grained(name, weight, block, scale_fmt):
    """What transformers writes and reads as DeepSeek does."""
    settings = types.SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    quantiser = types.SimpleNamespace(quantization_config=settings)
    key = f"{MODULE}.weight"
    stored = Fp8Quantize(quantiser)._quantize_one(key, weight)
    expected = Fp8Dequantize(quantiser)._dequantize_one(stored[key], stored[f"{key}_scale_inv"], torch.bfloat16)
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
        "scale_fmt": scale_fmt,
        "modules_to_not_convert": ["lm_head"],
    }
    write(name, config, stored, expected, torch_dtype="bfloat16")


def compressed_tensors(name, weight, compressor, scale, fmt, global_scale=None, inputs=None, to=None, **args):
    arguments = QuantizationArgs(type="float", symmetric=True, **args)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=inputs)
    state = {"weight": weight, "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    packed = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    tensors = {f"{MODULE}.{key}": value for key, value in packed.items()}
    if inputs is not None and not inputs.dynamic:
        tensors[f"{MODULE}.input_scale"] = torch.tensor([0.5], dtype=weight.dtype)
    write(name, config, tensors, expected if to is None else expected.to(to), torch_dtype=str(to or weight.dtype)[6:])


def amax(weight, rows, cols):
    """Largest magnitudes of blocks, those at the ends smaller."""
    padded = torch.nn.functional.pad(weight.float().abs(), (0, -weight.shape[1] % cols, 0, -weight.shape[0] % rows))
    return padded.unfold(0, rows, rows).unfold(1, cols, cols).amax((-1, -2))


def of_exponents(scale):
    return 2.0 ** torch.floor(torch.log2(scale))


def modelopt(root, name):
    """A file of the package without what it imports besides."""
    root = Path(root) / "modelopt/torch"
    for module in ("modelopt", "modelopt.torch", "modelopt.torch.quantization", "modelopt.torch.quantization.qtensor"):
        sys.modules.setdefault(module, types.ModuleType(module)).__path__ = []
    stubs = {
        "modelopt.torch.quantization.backends.utils": {"fp4_compatible": lambda: False},
        "modelopt.torch.quantization.utils": {
            "reduce_amax": None,
            "reduce_block_amax": None,
            "reduce_block_padding": lambda tensor, sizes: tensor,
            "convert_quantization_axis_to_reduce_axis": None,
        },
        "modelopt.torch.quantization.utils.numeric_utils": {},
    }
    for stub, members in stubs.items():
        module = sys.modules.setdefault(stub, types.ModuleType(stub))
        module.__dict__.update(members)
        module.__getattr__ = lambda name: None
    for file in ("base_qtensor", name):
        full = f"modelopt.torch.quantization.qtensor.{file}"
        spec = importlib.util.spec_from_file_location(full, root / f"quantization/qtensor/{file}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return module


def main():
    torch.manual_seed(11)
    weight = (torch.randn(ROWS, COLS) * torch.rand(ROWS, 1)).to(torch.bfloat16)
    weight[3, 5], weight[7] = -0.0, 0.0
    fine_grained("fp8-block", weight, [16, 32], "float")
    fine_grained("fp8-block-ue8m0", weight, [32, 48], "ue8m0")
    floats = FloatQuantizationCompressor
    dynamic = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    static = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
    one = (weight.float().abs().amax() / 448).reshape(1)
    compressed_tensors("fp8-tensor", weight, floats, one.to(torch.bfloat16), "float-quantized", inputs=static, num_bits=8, strategy="tensor")
    half = weight.half()
    rows = (half.float().abs().amax(1, keepdim=True).clamp(min=1e-3) / 448).half()
    compressed_tensors("fp8-channel", half, floats, rows, "float-quantized", inputs=dynamic, num_bits=8, strategy="channel")
    # The package pads matrices that are no whole blocks.
    blocks = amax(weight, 48, 40) / 448
    compressed_tensors(
        "fp8-block-ragged", weight, floats, blocks, "float-quantized", num_bits=8, strategy="block", block_structure=[48, 40], to=torch.bfloat16
    )
    groups = of_exponents(amax(weight, 1, 32).clamp(min=1e-3) / 448)
    compressed_tensors(
        "mxfp8", weight, MXFP8QuantizationCompressor, groups, "mxfp8-quantized", num_bits=8, strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    largest = weight.float().abs().amax()
    world = (448 * 6 / largest).reshape(1)
    groups = (amax(weight, 1, 16) / 6 * world).clamp(min=2**-9).to(torch.float8_e4m3fn).float()
    compressed_tensors(
        "nvfp4", weight, NVFP4PackedCompressor, groups, "nvfp4-pack-quantized", world, num_bits=4, strategy="tensor_group", group_size=16
    )
    groups = of_exponents(amax(weight, 1, 32).clamp(min=1e-3) / 4)
    compressed_tensors("mxfp4", weight, MXFP4PackedCompressor, groups, "mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)
    fp8, nvfp4 = modelopt(sys.argv[1], "fp8_tensor"), modelopt(sys.argv[1], "nvfp4_tensor")
    scale = largest / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    expected = fp8.FP8QTensor(weight.shape, torch.float32, stored).dequantize(torch.float32, scale=scale).to(torch.bfloat16)
    tensors = {f"{MODULE}.weight": stored, f"{MODULE}.weight_scale": scale, f"{MODULE}.input_scale": torch.tensor(0.25)}
    # Its older releases say it in a file of their own.
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    write("fp8-modelopt", None, tensors, expected, files={"hf_quant_config.json": said}, torch_dtype="bfloat16")
    double = largest / (6 * 448)
    groups = (amax(weight, 1, 16) / 6 / double).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    wide = (groups.float() * double).repeat_interleave(16, 1)
    codes = nvfp4.NVFP4QTensor._cast_fp4(weight.float() / wide)
    packed = codes[..., 1::2] << 4 | codes[..., 0::2]
    q = nvfp4.NVFP4QTensor(weight.shape, torch.bfloat16, packed)
    expected = q.dequantize(torch.float32, scale=groups, double_scale=double, block_sizes={-1: 16}).to(torch.bfloat16)
    tensors = {f"{MODULE}.weight": packed, f"{MODULE}.weight_scale": groups, f"{MODULE}.weight_scale_2": double}
    tensors[f"{MODULE}.input_scale"] = torch.tensor(0.25)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    write("nvfp4-modelopt", config, tensors, expected, dtype="bfloat16")
    # Two experts, of 24 outputs and 64 inputs, bytes by chance.
    blocks = torch.randint(0, 256, (2, 24, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 24, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    tensor = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{tensor}_blocks": blocks, f"{tensor}_scales": scales}
    write("mxfp4-gpt-oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, tensors, expected, tensor=tensor, dtype="bfloat16")


if __name__ == "__main__":
    main()
