#!/usr/bin/env python3
"""Runs what `llmpress export --as gguf` writes in llama.cpp and holds it against llmpress: token ids, perplexity, greedy text.

    python llama_cpp_perplexity.py BINS MODEL TEXT [--llmpress target/release/llmpress] [--windows 4] [--window 512] [--threads 2]

BINS is the directory with `libllama*.so` (llama_cpp_decode.py says where it comes from), MODEL any checkpoint that llmpress exports. It is
exported into a temporary directory and

- the text is tokenized by llama.cpp and by `tokenizers`, from the checkpoint's tokenizer.json (a small one's or the export's): the ids must be the same;
- perplexity is computed over the same windows as `llmpress eval ppl MODEL`, the first token of each not scored;
- both go on from the same prompt, the likeliest token each time.

Prints one JSON object on one line and fails where perplexities are more than 1 % apart or tokens differ. Python 3.11 or newer, and:

    pip install numpy==2.4.6 tokenizers==0.23.3
"""

import argparse
import ctypes as c
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from llama_cpp_decode import Batch, load
from tokenizers import Tokenizer

PROMPT = "The capital of France is"
NEW_TOKENS = 24


def more(llama):
    """Signatures that are used here besides."""
    for name, result, arguments in [
        ("batch_init", Batch, [c.c_int32, c.c_int32, c.c_int32]),
        ("n_batch", c.c_uint32, [c.c_void_p]),
    ]:
        function = getattr(llama, f"llama_{name}")
        function.restype, function.argtypes = result, arguments


def tokenize(llama, vocabulary, text):
    """The ids of a text, without special tokens around it; those written out in it are found."""
    raw = text.encode()
    tokens = (c.c_int32 * (len(raw) + 8))()
    count = llama.llama_tokenize(vocabulary, raw, len(raw), tokens, len(tokens), False, True)
    if count < 0:
        raise SystemExit("the text is not tokenized")
    return list(tokens[:count])


def logits(llama, context, batch, ids, size):
    """Those after every token of a window, [tokens, vocabulary]."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    as_ints = lambda pointer, kind: c.cast(pointer, c.POINTER(kind))
    for at, id in enumerate(ids):
        as_ints(batch.token, c.c_int32)[at] = id
        as_ints(batch.pos, c.c_int32)[at] = at
        as_ints(batch.n_seq_id, c.c_int32)[at] = 1
        as_ints(batch.seq_id, c.POINTER(c.c_int32))[at][0] = 0
        as_ints(batch.logits, c.c_int8)[at] = 1
    batch.tokens = len(ids)
    if llama.llama_decode(context, batch) != 0:
        raise SystemExit("a window does not run")
    return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, 0), (len(ids), size))


def perplexity(llama, context, ids, windows, window, size):
    """e to the mean loss of all tokens of the windows but their first."""
    batch = llama.llama_batch_init(window, 0, 1)
    loss, scored = 0.0, 0
    for first in range(0, windows * window, window):
        part = ids[first : first + window]
        rows = logits(llama, context, batch, part, size)
        for row, target in zip(rows[:-1], part[1:]):
            row = row.astype(np.float64)
            loss += math.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
            scored += 1
    return math.exp(loss / scored), scored


def greedy(llama, context, sampler, vocabulary, prompt, count):
    """The tokens that follow the prompt, and their text."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    tokens = (c.c_int32 * len(prompt))(*prompt)
    batch, text, piece = llama.llama_batch_get_one(tokens, len(prompt)), b"", c.create_string_buffer(256)
    one, made = (c.c_int32 * 1)(), []
    for _ in range(count):
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("a token does not run")
        one[0] = llama.llama_sampler_sample(sampler, context, -1)
        made.append(one[0])
        length = llama.llama_token_to_piece(vocabulary, one[0], piece, 256, 0, False)
        text += piece.raw[:length]
        batch = llama.llama_batch_get_one(one, 1)
    return made, text.decode(errors="replace")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bins", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--llmpress", default="llmpress", help="the program")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    run = lambda *words: subprocess.run([args.llmpress, "--quiet", *map(str, words)], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "export"
        run("export", args.model, out, "--as", "gguf")
        (file,) = out.glob("*.gguf")
        run("verify", file, "--against", args.model)
        llama = load(args.bins.resolve())
        more(llama)
        quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
        llama.llama_log_set(c.cast(quiet, c.c_void_p), None)
        model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        if not model:
            raise SystemExit(f"{file} does not load")
        context = llama.llama_init_from_model(model, llama.llama_context_default_params())
        llama.llama_set_n_threads(context, args.threads, args.threads)
        if args.window > min(llama.llama_n_ctx(context), llama.llama_n_batch(context)):
            raise SystemExit(f"windows of at most {llama.llama_n_ctx(context)} tokens")
        vocabulary = llama.llama_model_get_vocab(model)
        size = llama.llama_vocab_n_tokens(vocabulary)
        text = args.text.read_bytes().decode()
        ids = tokenize(llama, vocabulary, text)
        expected = Tokenizer.from_file(str(args.model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        windows = min(args.windows, len(ids) // args.window)
        theirs, scored = perplexity(llama, context, ids, windows, args.window, size)
        prompt = tokenize(llama, vocabulary, PROMPT)
        made, continued = greedy(llama, context, llama.llama_sampler_init_greedy(), vocabulary, prompt, NEW_TOKENS)
        ours = json.loads(
            run("eval", "ppl", args.model, "--text", args.text, "--window", args.window, "--limit", args.windows, "--bos", "never", "--json")
        )
        generated = json.loads(run("generate", args.model, "--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS, "--json"))
        result = {
            "file": file.name,
            "bytes": file.stat().st_size,
            "tokens": len(ids),
            "same_tokens": ids == expected,
            "scored_tokens": scored,
            "llama_cpp": round(theirs, 4),
            "llmpress": round(ours["perplexity"], 4),
            "percent_apart": round(100 * abs(theirs / ours["perplexity"] - 1), 4),
            "same_greedy_tokens": sum(a == b for a, b in zip(made, generated["tokens"])),
            "of": len(generated["tokens"]),
            "greedy_text": continued,
        }
        print(json.dumps(result), flush=True)
        if not result["same_tokens"] or scored != ours["scored_tokens"] or result["percent_apart"] > 1:
            raise SystemExit(f"llama.cpp differs; llmpress goes on with {generated['text']!r}")
    # The libraries' own endings are not waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
