#!/usr/bin/env python3
"""Times zipnn and zstd on BF16 weights, on one core: the peers of the lossless encodings.

    taskset -c 0 python zipnn_peer.py WEIGHTS.bf16 [--runs 7] [--limit BYTES] [--chunk BYTES]

WEIGHTS.bf16 is a raw file of little-endian BF16 words. Prints one JSON object a line and peer: {peer, ratio,
compress_gbps, decompress_gbps}. `ratio` is compressed size over input size; speeds are in GB/s (1e9 bytes) of BF16
input, medians of the runs after one run to warm up, from memory to memory. Every round trip is checked to be exact.

Peers, through their public Python calls: zipnn with dtype bfloat16 and one thread (its wrapper copies the input once,
which counts); zstd level 3 on the interleaved words. With --chunk the input is handled in pieces of that size, which
spares the peers the page faults of large new buffers. Pin the process to one core, as above.

Python 3.11 or newer, and:

    pip install zipnn==0.5.4 zstandard==0.25.0
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import zstandard
from zipnn import ZipNN


def timed(function, pieces, mutable):
    """Seconds that `function` takes over all pieces, and its results."""
    seconds, results = 0.0, []
    for piece in pieces:
        # zipnn may work in place on a mutable buffer: every call gets its own copy, made outside of the time.
        argument = bytearray(piece) if mutable else piece
        start = time.perf_counter()
        result = function(argument)
        seconds += time.perf_counter() - start
        results.append(bytes(result))
    return seconds, results


def measure(peer, pieces, compress, decompress, runs, mutable):
    """One peer's figures."""
    compress_seconds, decompress_seconds = [], []
    for _ in range(runs + 1):
        seconds, packed = timed(compress, pieces, mutable)
        compress_seconds.append(seconds)
        seconds, unpacked = timed(decompress, packed, False)
        decompress_seconds.append(seconds)
        if unpacked != pieces:
            raise SystemExit(f"{peer}: the round trip changed the data")
        del unpacked
    size = sum(map(len, pieces))
    return {
        "peer": peer,
        "ratio": round(sum(map(len, packed)) / size, 5),
        "compress_gbps": round(size / statistics.median(compress_seconds[1:]) / 1e9, 4),
        "decompress_gbps": round(size / statistics.median(decompress_seconds[1:]) / 1e9, 4),
    }


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="raw file of BF16 words")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each direction")
    parser.add_argument("--limit", type=int, help="use only so many bytes of the file")
    parser.add_argument("--chunk", type=int, help="bytes a call (default: all in one)")
    args = parser.parse_args()

    with args.weights.open("rb") as file:
        data = file.read(-1 if args.limit is None else args.limit)
    data = data[: len(data) // 2 * 2]
    if not data:
        raise SystemExit("no weights")

    step = max(args.chunk or len(data), 2) // 2 * 2
    pieces = [data[at : at + step] for at in range(0, len(data), step)]

    zipnn = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
    zstd_in, zstd_out = zstandard.ZstdCompressor(level=3, threads=0), zstandard.ZstdDecompressor()
    peers = [
        ("zipnn", zipnn.compress, zipnn.decompress, True),
        ("zstd-3", zstd_in.compress, zstd_out.decompress, False),
    ]
    for peer, compress, decompress, mutable in peers:
        print(json.dumps(measure(peer, pieces, compress, decompress, args.runs, mutable)), flush=True)


if __name__ == "__main__":
    main()
