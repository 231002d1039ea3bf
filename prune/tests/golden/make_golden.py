"""Logits of pruned checkpoints by transformers, in single precision and without code of our own.

    llmpress convert examples/tinylm PORTABLE --recipe portable.toml
    llmpress convert examples/tinylm BLOCKS --recipe blocks.toml
    python3 make_golden.py PORTABLE portable.safetensors
    python3 make_golden.py BLOCKS blocks.safetensors

The recipes are in this directory. The last four tokens of forty are kept.
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor([[(i * 97 + 5) % 4096 for i in range(40)]])
with torch.no_grad():
    logits = model(ids).logits[0, -4:].contiguous()
save_file({"logits": logits}, sys.argv[2])
print(sys.argv[1], model.config.num_hidden_layers, "layers", logits.shape)
