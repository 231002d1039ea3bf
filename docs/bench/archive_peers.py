#!/usr/bin/env python3
"""Times `--to archive` and other compressors of checkpoints, from file to file, on one core.

    taskset -c 0 python archive_peers.py MODEL.safetensors --llmpress target/release/llmpress [--runs 3]

MODEL.safetensors is one file, or a directory with one. Each tool is its own process, so that starting Python and reading
and writing files count; `llmpress convert` and `restore` also hash everything, and `convert` decodes and compares what
it wrote. Prints one JSON object a tool: {tool, share, compress_gbps, decompress_gbps}: size against the input's, and
GB/s (1e9 bytes) of input, medians. What comes back is compared with the input, byte for byte where the tool keeps
the file and by `llmpress verify` where it keeps the tensors.

    pip install lmzip==1.3.0 bigsmall==4.0.0 zipnn==0.5.4 zstandard==0.25.0
"""

import argparse
import filecmp
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ZSTD = "import sys, zstandard as z; a, b = open(sys.argv[1], 'rb'), open(sys.argv[2], 'wb')\n"
ZIPNN = (
    "import sys; from zipnn import ZipNN; z = ZipNN(input_format='byte', bytearray_dtype='bfloat16', threads=1)\n"
    "a = open(sys.argv[1], 'rb').read(); "
)


def size(path):
    """Bytes of a file, or of all files below a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def run(command):
    """Seconds that a command takes."""
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout)[-800:]}")
    return time.perf_counter() - start


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llmpress", type=Path, default=Path("target/release/llmpress"))
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    given = args.model if args.model.is_dir() else args.model.parent
    scripts = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        source, packed, back = work / "source", work / "packed", work / "back"
        source.mkdir()
        for name in ["config.json", "model.safetensors"]:
            shutil.copyfile(given / name, source / name)
        file = source / "model.safetensors"
        llmpress, python = args.llmpress.resolve(), sys.executable
        both = ["--jobs", "1", "--quiet"]
        tools = {
            "llmpress archive": (
                [llmpress, "convert", source, packed, "--to", "archive", *both],
                [llmpress, "restore", packed, back, *both],
                [llmpress, "verify", back, "--against", source, "--quiet"],
            ),
            "lmzip": (
                [scripts / "lmz", "compress", file, packed, "-j", "1", "-q"],
                [scripts / "lmz", "decompress", packed, back, "-j", "1", "-q"],
                None,
            ),
            "bigsmall": (
                [scripts / "bigsmall", "compress", file, "-o", packed.with_suffix(".bs"), "--no-progress"],
                [scripts / "bigsmall", "decompress", packed.with_suffix(".bs"), "-o", back / file.name, "--no-progress"],
                [llmpress, "verify", back, "--against", source, "--quiet"],
            ),
            "zipnn": (
                [python, "-c", ZIPNN + "open(sys.argv[2], 'wb').write(z.compress(bytearray(a)))", file, packed],
                [python, "-c", ZIPNN + "open(sys.argv[2], 'wb').write(z.decompress(a))", packed, back],
                None,
            ),
            "zstd -19": (
                [python, "-c", ZSTD + "z.ZstdCompressor(level=19).copy_stream(a, b)", file, packed],
                [python, "-c", ZSTD + "z.ZstdDecompressor().copy_stream(a, b)", packed, back],
                None,
            ),
        }
        for tool, (compress, decompress, verify) in tools.items():
            ins, outs = [], []
            try:
                for _ in range(1 if tool == "zstd -19" else args.runs):
                    for old in [packed, packed.with_suffix(".bs"), back]:
                        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
                    if tool == "bigsmall":
                        back.mkdir()
                        shutil.copyfile(source / "config.json", back / "config.json")
                    ins.append(run(compress))
                    stored = next(p for p in [packed, packed.with_suffix(".bs")] if p.exists())
                    share = size(stored) / size(source if stored.is_dir() else file)
                    outs.append(run(decompress))
                    if verify:
                        run(verify)
                    elif not filecmp.cmp(file, back, shallow=False):
                        raise RuntimeError("the round trip changed the file")
            except (RuntimeError, StopIteration) as error:
                print(json.dumps({"tool": tool, "error": str(error)}), flush=True)
                continue
            gb = size(file) / 1e9
            row = {"tool": tool, "share": round(share, 5)}
            row |= {"compress_gbps": round(gb / statistics.median(ins), 3)}
            row |= {"decompress_gbps": round(gb / statistics.median(outs), 3)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
