#!/usr/bin/env python3
"""The perplexity of a plain checkpoint by transformers, in F32: what `llmpress eval ppl` is held against.

    python transformers_perplexity.py MODEL_DIR TEXT [--windows 4] [--window 512]

Tokens of the whole text without special ones, cut into windows one after the other; the first token of each is not
scored. Prints one JSON object on one line: {perplexity, scored_tokens, transformers}. Python 3.11 or newer, and:

    pip install torch==2.15.0 transformers==5.24.0
"""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    loss, scored = 0.0, 0
    with torch.no_grad():
        for i in range(args.windows):
            window = torch.tensor([ids[i * args.window : (i + 1) * args.window]])
            likelihoods = torch.log_softmax(model(window).logits[0].double(), -1)
            targets = window[0, 1:]
            loss -= likelihoods[torch.arange(len(targets)), targets].sum().item()
            scored += len(targets)
    print(json.dumps({"perplexity": math.exp(loss / scored), "scored_tokens": scored, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
