#!/usr/bin/env python3
"""Runs a directory that `llmpress convert --to dfloat11` wrote with the official dfloat11 package, on a GPU.

    python dfloat11_official.py MODEL_DIR CONVERTED_DIR [--tokens 64] [--repeats 5]

Loads MODEL_DIR with transformers and CONVERTED_DIR with DFloat11Model.from_pretrained, reads the same tokens with both
(token i being (i * 7919 + 13) mod the vocabulary size), and compares all logits bit for bit. Prints one JSON object on
one line: {equal, differing_logits, tokens, plain_ms, dfloat11_ms, dfloat11, transformers, torch, gpu}; times are medians
of a forward after one to warm up. Exit code 1 where a logit differs.

Needs an NVIDIA GPU. Python 3.11 or newer, and:

    pip install torch==2.15.0 transformers==5.23.0 'dfloat11[cuda12]==0.5.0'
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
import types
from pathlib import Path


def provide_pkg_resources():
    """The package asks `pkg_resources`, which newer setuptools no longer bring, for the path of its kernel."""
    if importlib.util.find_spec("pkg_resources"):
        return
    module = types.ModuleType("pkg_resources")

    def resource_filename(package, name):
        return str(Path(importlib.util.find_spec(package).submodule_search_locations[0]) / name)

    module.resource_filename = resource_filename
    sys.modules["pkg_resources"] = module


def forward(torch, model, ids, repeats):
    """Logits of all tokens, and milliseconds of a forward."""
    times = []
    with torch.inference_mode():
        logits = model(ids).logits
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(ids)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
    return logits, round(statistics.median(times), 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    provide_pkg_resources()
    import torch
    import transformers
    from dfloat11 import DFloat11Model
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        sys.exit("no GPU: the package decodes on NVIDIA GPUs only")

    plain = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).cuda().eval()
    # The package replaces the weights of a model that was made without them.
    config = AutoConfig.from_pretrained(arguments.model)
    empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    empty.tie_weights()
    packed = DFloat11Model.from_pretrained(str(arguments.converted), bfloat16_model=empty, device="cuda")

    vocab = config.vocab_size
    ids = torch.tensor([[(i * 7919 + 13) % vocab for i in range(arguments.tokens)]], device="cuda")
    expected, plain_ms = forward(torch, plain, ids, arguments.repeats)
    found, packed_ms = forward(torch, packed, ids, arguments.repeats)
    differing = int((expected.view(torch.int16) != found.view(torch.int16)).sum())
    print(
        json.dumps(
            {
                "equal": differing == 0,
                "differing_logits": differing,
                "tokens": arguments.tokens,
                "plain_ms": plain_ms,
                "dfloat11_ms": packed_ms,
                "dfloat11": importlib.metadata.version("dfloat11"),
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "gpu": torch.cuda.get_device_name(),
            }
        )
    )
    sys.exit(0 if differing == 0 else 1)


if __name__ == "__main__":
    main()
