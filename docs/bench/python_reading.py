#!/usr/bin/env python3
"""Times reading all tensors of a checkpoint from Python beside the Rust library, on one thread each.

    cargo build --release -p llmpress-formats --example read_speed
    taskset -c 0 python docs/bench/python_reading.py DIR... [--rounds 7] [--program target/release/examples/read_speed]

Both read every tensor into new memory and throw it away; a round of one is followed by a round of the other. Prints a JSON object a directory:
{directory, bytes, rust_gbps, python_gbps, share}, the medians in GB/s (1e9 bytes of decoded tensors) and Python's share of Rust's speed. A warm-up round of
each does not count.

Python 3.10 or newer, and `pip install ./python`.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import llmpress


def rust(program, directory):
    """Seconds of a round, and bytes."""
    done = subprocess.run([program, directory, "1"], check=True, capture_output=True, text=True)
    round = json.loads(done.stdout)
    return round["seconds"], round["bytes"]


def python(checkpoint):
    """The same from here."""
    start, read = time.perf_counter(), 0
    for name in checkpoint:
        read += checkpoint.read(name, copy=True).nbytes
    return time.perf_counter() - start, read


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    target = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).parents[2] / "target"))
    parser.add_argument("--program", type=Path, default=target / "release" / "examples" / "read_speed")
    arguments = parser.parse_args()
    for directory in arguments.directories:
        checkpoint = llmpress.open(directory, threads=1)
        seconds = {"rust": [], "python": []}
        for round in range(arguments.rounds + 1):
            ours, size = python(checkpoint)
            theirs, same = rust(arguments.program, directory)
            assert size == same, (size, same)
            if round > 0:
                seconds["python"].append(ours)
                seconds["rust"].append(theirs)
        speed = {who: size / statistics.median(all) / 1e9 for who, all in seconds.items()}
        print(
            json.dumps(
                {
                    "directory": str(directory),
                    "bytes": size,
                    "rust_gbps": round_to(speed["rust"]),
                    "python_gbps": round_to(speed["python"]),
                    "share": round_to(speed["python"] / speed["rust"]),
                }
            ),
            flush=True,
        )


def round_to(number):
    return float(f"{number:.3g}")


if __name__ == "__main__":
    main()
