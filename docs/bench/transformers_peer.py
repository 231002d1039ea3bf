#!/usr/bin/env python3
"""Times transformers on a CPU: the peer of this project's inference.

    python transformers_peer.py MODEL_DIR [--prompt-tokens 512] [--new-tokens 32] [--dtype float32|bfloat16]
        [--threads 2] [--repeats 3]

Loads the model with SDPA attention and the default KV cache, without compilation, and prints one JSON object on one
line: {model, dtype, threads, prompt_tokens, new_tokens, prefill_tokens_per_s, decode_tokens_per_s,
time_to_first_token_s, load_s, peak_rss_mib, torch, transformers}. Times are medians of the repeats after one run to
warm up.

prefill    one forward over the prompt, token i being (i * 7919 + 13) mod the vocabulary size, with an empty cache and
           the logits of the last position only; time_to_first_token_s adds the choice of the token
decode     new-tokens greedy steps after it, one token each, with the cache
load       from_pretrained, with the files in the page cache

peak_rss_mib is that of the whole process, Python and its libraries included. Python 3.11 or newer, and:

    pip install torch==2.15.0 transformers==5.23.0
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def run(model, prompt, new_tokens):
    """Seconds of the prefill, to the first token, and of all decoding steps."""
    start = time.perf_counter()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    token = out.logits[:, -1:].argmax(-1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
    return prefill, first, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    ).eval()
    load = time.perf_counter() - start

    prompt = torch.tensor([[(i * 7919 + 13) % model.config.vocab_size for i in range(arguments.prompt_tokens)]])
    run(model, prompt, arguments.new_tokens)
    runs = [run(model, prompt, arguments.new_tokens) for _ in range(arguments.repeats)]
    prefill, first, decode = (statistics.median(times) for times in zip(*runs))
    print(
        json.dumps(
            {
                "peer": f"transformers {transformers.__version__}, {arguments.dtype}",
                "model": arguments.model.name,
                "dtype": arguments.dtype,
                "threads": arguments.threads,
                "prompt_tokens": arguments.prompt_tokens,
                "new_tokens": arguments.new_tokens,
                "prefill_tokens_per_s": round(arguments.prompt_tokens / prefill, 2),
                "decode_tokens_per_s": round(arguments.new_tokens / decode, 2),
                "time_to_first_token_s": round(first, 4),
                "load_s": round(load, 3),
                "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
