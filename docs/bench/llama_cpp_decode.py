#!/usr/bin/env python3
"""Times llama.cpp running a model on a CPU: the peer of our whole decode.

    python3 llama_cpp_decode.py BINS MODEL.gguf [--prompt-tokens 64] [--new-tokens 64] [--threads 1] [--repeats 1] [--text]

BINS is the directory with `libllama*.so`, as the npm package brings it prebuilt:

    npm install @node-llama-cpp/linux-x64@3.22.1
    BINS=node_modules/@node-llama-cpp/linux-x64/bins/linux-x64

gguf_q4_0.py makes MODEL.gguf. Prints one JSON object on one line, {peer, prefill_tokens_per_s, decode_tokens_per_s, ...}, so that
`llmpress speed --peer` runs it in turn with our models. The prompt is token i = (i * 7919 + 13) mod the vocabulary size; then the likeliest
token is taken each time. Times are medians of the repeats, after one run to warm up. --text prints instead how the model goes on from a
sentence, to see that the file is right. Python 3.11 or newer, nothing else.
"""

import argparse
import ctypes as c
import json
import os
import statistics
import time
from pathlib import Path


class Opaque(c.Structure):
    """Parameters as the library makes them: larger than any version's, passed on as they are."""

    _fields_ = [("bytes", c.c_ubyte * 2048)]


class Batch(c.Structure):
    _fields_ = [("tokens", c.c_int32), ("token", c.c_void_p), ("embd", c.c_void_p), ("pos", c.c_void_p)]
    _fields_ += [("n_seq_id", c.c_void_p), ("seq_id", c.c_void_p), ("logits", c.c_void_p)]


def load(bins):
    """The library, with the signatures that are used here."""
    c.CDLL(str(next(bins.glob("libggml-base*"))), mode=c.RTLD_GLOBAL)
    registry = c.CDLL(str(next(bins.glob("libggml.*"))), mode=c.RTLD_GLOBAL)
    registry.ggml_backend_load_all_from_path.argtypes = [c.c_char_p]
    registry.ggml_backend_load_all_from_path(str(bins).encode())
    llama = c.CDLL(str(next(bins.glob("libllama.*"))), mode=c.RTLD_GLOBAL)
    pointer, integer = c.c_void_p, c.c_int32
    for name, result, arguments in [
        ("log_set", None, [pointer, pointer]),
        ("model_default_params", Opaque, []),
        ("context_default_params", Opaque, []),
        ("model_load_from_file", pointer, [c.c_char_p, Opaque]),
        ("init_from_model", pointer, [pointer, Opaque]),
        ("model_get_vocab", pointer, [pointer]),
        ("vocab_n_tokens", integer, [pointer]),
        ("n_ctx", c.c_uint32, [pointer]),
        ("set_n_threads", None, [pointer, integer, integer]),
        ("get_memory", pointer, [pointer]),
        ("memory_clear", None, [pointer, c.c_bool]),
        ("batch_get_one", Batch, [pointer, integer]),
        ("decode", integer, [pointer, Batch]),
        ("get_logits_ith", c.POINTER(c.c_float), [pointer, integer]),
        ("tokenize", integer, [pointer, c.c_char_p, integer, pointer, integer, c.c_bool, c.c_bool]),
        ("token_to_piece", integer, [pointer, integer, pointer, integer, integer, c.c_bool]),
        ("sampler_init_greedy", pointer, []),
        ("sampler_sample", integer, [pointer, pointer, integer]),
    ]:
        function = getattr(llama, f"llama_{name}")
        function.restype, function.argtypes = result, arguments
    return llama


def run(llama, context, sampler, prompt, new_tokens):
    """Seconds of the prefill, with the choice of a token, and of the steps after it; and their tokens."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    tokens = (c.c_int32 * len(prompt))(*prompt)
    one = (c.c_int32 * 1)()
    start = time.perf_counter()
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(prompt))) != 0:
        raise SystemExit("the prompt does not run")
    one[0] = llama.llama_sampler_sample(sampler, context, -1)
    prefill = time.perf_counter() - start
    made = [one[0]]
    start = time.perf_counter()
    for _ in range(new_tokens):
        if llama.llama_decode(context, llama.llama_batch_get_one(one, 1)) != 0:
            raise SystemExit("a token does not run")
        one[0] = llama.llama_sampler_sample(sampler, context, -1)
        made.append(one[0])
    return prefill, time.perf_counter() - start, made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bins", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--text", action="store_true")
    args = parser.parse_args()
    llama = load(args.bins.resolve())
    quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
    llama.llama_log_set(c.cast(quiet, c.c_void_p), None)
    model = llama.llama_model_load_from_file(str(args.model).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"{args.model} does not load")
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    llama.llama_set_n_threads(context, args.threads, args.threads)
    if args.prompt_tokens + args.new_tokens > llama.llama_n_ctx(context):
        raise SystemExit(f"at most {llama.llama_n_ctx(context)} tokens, prompt included")
    vocabulary = llama.llama_model_get_vocab(model)
    sampler = llama.llama_sampler_init_greedy()
    if args.text:
        sentence = b"The capital of France is"
        tokens = (c.c_int32 * 64)()
        count = llama.llama_tokenize(vocabulary, sentence, len(sentence), tokens, 64, False, False)
        *_, made = run(llama, context, sampler, tokens[:count], args.new_tokens)
        piece = c.create_string_buffer(256)
        for token in made:
            count = llama.llama_token_to_piece(vocabulary, token, piece, 256, 0, False)
            sentence += piece.raw[:count]
        print(sentence.decode(errors="replace"))
        return
    size = llama.llama_vocab_n_tokens(vocabulary)
    prompt = [(i * 7919 + 13) % size for i in range(args.prompt_tokens)]
    run(llama, context, sampler, prompt, min(args.new_tokens, 8))
    runs = [run(llama, context, sampler, prompt, args.new_tokens) for _ in range(args.repeats)]
    prefill, decode = (statistics.median(times) for times in list(zip(*runs))[:2])
    print(
        json.dumps({
            "peer": f"llama.cpp, {args.model.name}",
            "threads": args.threads,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "prefill_tokens_per_s": round(args.prompt_tokens / prefill, 2),
            "decode_tokens_per_s": round(args.new_tokens / decode, 2),
        }),
        flush=True,
    )
    # The libraries' own endings are not waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
