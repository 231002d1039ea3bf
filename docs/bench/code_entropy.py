#!/usr/bin/env python3
"""What entropy coding would save on the codes of checkpoints that llmpress quantised.

    llmpress convert MODEL OUT --to gptq:w4,g128 --calib TEXT
    python code_entropy.py OUT [OUT ...]

For each: bits of a code as it is stored, and the order-0 entropy of the codes, in bits a weight: with one table for a whole matrix,
for every row and for every group (their tables cost nothing here, which flatters them), and of the bit planes each by itself. Last,
what zstd makes of whole codes in bytes (as many as fit a byte), in pieces of 2^18 bytes: what can be had with what is there.

Needs numpy, safetensors and zstandard.
"""

import json
import sys
from pathlib import Path

import numpy as np
import zstandard
from safetensors import safe_open

PIECE = 1 << 18


def entropy(counts):
    """Bits of all symbols together, given how often each comes; the last axis is that of symbols."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts > 0, counts * np.log2(total / np.maximum(counts, 1)), 0.0)
    return float(bits.sum())


def counts_of(codes, levels):
    """How often each code comes in every row of `codes`."""
    rows = np.arange(codes.shape[0])[:, None] * levels
    return np.bincount((codes + rows).ravel(), minlength=codes.shape[0] * levels).reshape(-1, levels)


def unpack(planes, columns):
    bits = np.unpackbits(planes.view(np.uint8).reshape(*planes.shape[:2], -1), axis=-1, bitorder="little")[..., :columns]
    return sum(plane.astype(np.int64) << number for number, plane in enumerate(bits)), bits


def packed(codes, planes):
    each = 8 // planes
    flat = codes.ravel().astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    return sum((flat[:, i] << (i * planes)).astype(np.uint8) for i in range(each)).astype(np.uint8).tobytes()


def measure(directory):
    manifest = json.loads((Path(directory) / "llmpress.json").read_text())
    files = [safe_open(path, "np") for path in sorted(Path(directory).glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}
    sums = dict.fromkeys(["weights", "stored", "scales", "matrix", "row", "group", "planes", "zstd"], 0.0)
    coder = zstandard.ZstdCompressor(level=3)
    for unit in manifest["units"].values():
        if unit["encoding"]["name"] != "abq":
            continue
        encoding = unit["encoding"]
        tensor = manifest["tensors"][unit["tensors"][0]]
        columns = tensor["shape"][-1]
        stored = {name: component["tensor"] for name, component in unit["components"].items()}
        planes = where[stored["planes"]].get_tensor(stored["planes"])
        codes, bits = unpack(planes, columns)
        levels, count = 1 << planes.shape[0], codes.size
        sums["weights"] += count
        sums["stored"] += count * planes.shape[0]
        for name in stored:
            if name != "planes":
                sums["scales"] += where[stored[name]].get_tensor(stored[name]).nbytes * 8
        by_row = counts_of(codes, levels)
        sums["matrix"] += entropy(by_row.sum(0))
        sums["row"] += entropy(by_row)
        size = encoding.get("group_size") or columns
        for first in range(0, columns, size):
            sums["group"] += entropy(counts_of(codes[:, first : first + size], levels))
        sums["planes"] += sum(entropy(np.bincount(plane.ravel(), minlength=2)) for plane in bits)
        data = packed(codes, planes.shape[0])
        sums["zstd"] += 8 * sum(len(coder.compress(data[i : i + PIECE])) for i in range(0, len(data), PIECE))
    weights = sums.pop("weights")
    return {name: value / weights for name, value in sums.items()}


def main(directories):
    print("| checkpoint | stored | scales | matrix | row | group | planes | zstd | saved by zstd, of matrices |")
    print("|---|---|---|---|---|---|---|---|---|")
    for directory in directories:
        bits = measure(directory)
        saved = (bits["stored"] - bits["zstd"]) / (bits["stored"] + bits["scales"])
        row = " | ".join(f"{bits[name]:.3f}" for name in ["stored", "scales", "matrix", "row", "group", "planes", "zstd"])
        print(f"| {Path(directory).name} | {row} | {100 * saved:.1f} % |")


if __name__ == "__main__":
    main(sys.argv[1:])
