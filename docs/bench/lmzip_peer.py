#!/usr/bin/env python3
"""Times lmzip on BF16 weights, on one core: a peer of the `archive` encoding.

    taskset -c 0 python lmzip_peer.py WEIGHTS.bf16 [--runs 3] [--work /dev/shm]

WEIGHTS.bf16 is a raw file of little-endian BF16 words: it is written once as a safetensors file with one tensor, since lmzip goes by their
headers. Prints a JSON object {peer, ratio, compress_gbps, decompress_gbps}: compressed size over input size, and GB/s (1e9 bytes) of BF16 input, medians of
the runs after one run to warm up, through its public Python calls with one worker, without its checksums, from file to file in WORK, which is to lie in
memory. Every round trip is checked to be exact. The interpreter's start is not counted.

Python 3.11 or newer, and:

    pip install lmzip==1.3.0
"""

import argparse
import filecmp
import json
import statistics
import tempfile
import time
from pathlib import Path

from lmz.api import compress, decompress


def seconds(function, source, target, **options):
    """Seconds of a call that makes a file anew."""
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    function(str(source), str(target), workers=1, **options)
    return time.perf_counter() - start


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="raw file of BF16 words")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each direction")
    parser.add_argument("--work", default="/dev/shm", help="a directory in memory")
    args = parser.parse_args()
    data = args.weights.read_bytes()
    data = data[: len(data) // 2 * 2]
    tensor = {"dtype": "BF16", "shape": [len(data) // 2], "data_offsets": [0, len(data)]}
    header = json.dumps({"weights": tensor}).encode()
    header += b" " * (-len(header) % 8)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        source, packed, back = (Path(work) / name for name in ["weights.safetensors", "packed", "back.safetensors"])
        source.write_bytes(len(header).to_bytes(8, "little") + header + data)
        ins, outs = [], []
        for _ in range(args.runs + 1):
            ins.append(seconds(compress, source, packed, checksum=False))
            outs.append(seconds(decompress, packed, back, verify_checksums=False))
            if not filecmp.cmp(source, back, shallow=False):
                raise SystemExit("lmzip: the round trip changed the data")
        ratio = packed.stat().st_size / source.stat().st_size
    row = {"peer": "lmzip", "ratio": round(ratio, 5)}
    row["compress_gbps"] = round(len(data) / statistics.median(ins[1:]) / 1e9, 4)
    row["decompress_gbps"] = round(len(data) / statistics.median(outs[1:]) / 1e9, 4)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
