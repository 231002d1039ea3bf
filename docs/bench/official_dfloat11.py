#!/usr/bin/env python3
"""Has the official DFloat11 runtime load a directory that llmpress wrote and compares the logits with the original's.

    llmpress convert SOURCE OUT --to dfloat11
    python official_dfloat11.py SOURCE OUT [--tokens 64] [--device cuda]

SOURCE is a Hugging Face checkpoint in BF16, OUT its conversion. The original runs through transformers in BF16; the
conversion through transformers too, with the package's own kernel decoding each block. The weights are the same bits, so
must the logits be, all of them. Prints one JSON object on one line: {source, converted, tokens, logits, differing, equal,
largest_difference, device, dfloat11, torch, transformers}. Exit code 1 where a logit differs.

A checkpoint whose head is its embedding is tied before the conversion is loaded, since the package leaves that out.

It needs an NVIDIA GPU. Python 3.11 or newer, and:

    pip install torch==2.15.0 transformers==5.23.0 'dfloat11[cuda12]==0.5.0'

dfloat11 0.5.0 imports pkg_resources, which setuptools 81 and newer no longer have; the one call that it makes of it is
answered here then.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def answer_for_pkg_resources():
    """Gives `pkg_resources.resource_filename` where setuptools does not bring it."""
    if importlib.util.find_spec("pkg_resources") is not None:
        return

    def resource_filename(package, name):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed")
        return str(Path(spec.origin).parent / name)

    module = types.ModuleType("pkg_resources")
    module.resource_filename = resource_filename
    sys.modules["pkg_resources"] = module


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face checkpoint in BF16")
    parser.add_argument("converted", type=Path, help="its conversion: llmpress convert --to dfloat11")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to read")
    parser.add_argument("--device", default="cuda", help="the GPU, as torch names it")
    arguments = parser.parse_args()
    for folder in (arguments.source, arguments.converted):
        if not (folder / "config.json").is_file():
            parser.error(f"{folder}: there is no config.json")
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU, and the official kernel runs on nothing else")

    answer_for_pkg_resources()
    from dfloat11 import DFloat11Model

    plain = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.bfloat16).to(arguments.device).eval()
    converted = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(arguments.source), dtype=torch.bfloat16
    ).eval()
    converted.tie_weights()
    converted = DFloat11Model.from_pretrained(
        str(arguments.converted), bfloat16_model=converted, device=arguments.device
    )

    vocabulary = plain.config.vocab_size
    ids = torch.tensor([[(i * 7919 + 13) % vocabulary for i in range(arguments.tokens)]], device=arguments.device)
    with torch.inference_mode():
        expected, found = plain(ids).logits, converted(ids).logits
    # By their bits, so that a NaN is equal to itself and zeros of either sign are not.
    differing = int((expected.view(torch.int16) != found.view(torch.int16)).sum())
    print(
        json.dumps(
            {
                "source": arguments.source.name,
                "converted": arguments.converted.name,
                "tokens": arguments.tokens,
                "logits": expected.numel(),
                "differing": differing,
                "equal": differing == 0,
                "largest_difference": float((expected.float() - found.float()).abs().max()),
                "device": torch.cuda.get_device_name(arguments.device),
                "dfloat11": importlib.metadata.version("dfloat11"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )
    raise SystemExit(0 if differing == 0 else 1)


if __name__ == "__main__":
    main()
