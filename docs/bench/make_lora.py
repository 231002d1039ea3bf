#!/usr/bin/env python3
"""Makes a fine-tune of a BF16 checkpoint: a random LoRA, merged into its linears.

    python make_lora.py MODEL OUT [--targets attention|all] [--rank 16] [--alpha 32] [--update 0.01] [--seed 1]

To each matrix W of the targets comes (alpha / rank) B A, summed in F32 and rounded to BF16 once, as peft's merge_and_unload does. A is
drawn as peft initialises it (uniform within 1 / sqrt(inputs)), B from a normal distribution that is scaled so that the update has
`--update` of W's root mean square: trained adapters come to some thousandths to some hundredths of it. Everything else stays as it is,
to the byte. The same seed gives the same bytes.

    pip install numpy==2.4.6
"""

import argparse
import json
import shutil
import zlib
from pathlib import Path

import numpy as np

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def widen(words):
    """BF16 words as F32."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """F32 as BF16 words: to the nearest, of two to the even one."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read_header(file):
    """What a safetensors file says of its tensors, and where their data begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def merged(name, words, args):
    """The matrix with its adapter, and the deviation of B."""
    # Each matrix draws its own numbers, whatever file it lies in.
    rng = np.random.default_rng([args.seed, zlib.crc32(name.encode())])
    weights = widen(words)
    rows, cols = weights.shape
    bound = 1 / np.sqrt(cols)
    a = rng.uniform(-bound, bound, (args.rank, cols)).astype(np.float32)
    b = rng.standard_normal((rows, args.rank)).astype(np.float32)
    update = (args.alpha / args.rank) * (b @ a)
    size = np.sqrt(np.mean(np.square(weights, dtype=np.float64)) / np.mean(np.square(update, dtype=np.float64)))
    size *= args.update
    return narrow(weights + np.float32(size) * update), size


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--targets", choices=["attention", "all"], default="all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--update", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    targets = ATTENTION if args.targets == "attention" else ATTENTION + MLP
    args.out.mkdir()
    changed, deviations = 0, []
    for file in sorted(args.model.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copyfile(file, args.out / file.name)
            continue
        header, start = read_header(file)
        copy = args.out / file.name
        shutil.copyfile(file, copy)
        data = np.memmap(copy, np.uint8, "r+", start)
        for name, tensor in sorted(header.items()):
            module = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if module not in targets or tensor["dtype"] != "BF16":
                continue
            words = data[slice(*tensor["data_offsets"])].view(np.uint16).reshape(tensor["shape"])
            words[:], deviation = merged(name, words, args)
            changed += 1
            deviations.append(deviation)
        data.flush()
    if not changed:
        raise SystemExit(f"{args.model}: none of its BF16 tensors is called {', '.join(targets)}")
    print(f"{changed} matrices; B deviates by {min(deviations):.5f} to {max(deviations):.5f}")


if __name__ == "__main__":
    main()
