#!/usr/bin/env python3
"""Times `--to archive` and other compressors of checkpoints, from file to file, on one core.

    taskset -c 0 python archive_peers.py MODEL.safetensors --llmpress target/release/llmpress [--runs 3]

MODEL.safetensors is one file beside a config.json, or a directory with one model.safetensors. Each tool is its own process, so that
starting Python and reading and writing files count; `llmpress convert` and `restore` also hash everything, and `convert` decodes and
compares what it wrote. Prints one JSON object a tool: {tool, share, compress_gbps, decompress_gbps}: size against the input's, and GB/s (1e9
bytes) of input and processor time, user and system, medians. What comes back is compared with the input, byte for byte where the tool keeps the file and by `llmpress verify`
where it keeps the tensors. Before them two bounds, of whole files: each float tensor's exponents at their entropy and all else as it is, and its
magnitudes (exponent and mantissa) at theirs and the sign as it is, without any table.

    pip install lmzip==1.3.0 bigsmall==4.0.0 zipnn==0.5.4 zstandard==0.25.0 numpy==2.4.4
"""

import argparse
import filecmp
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

ZSTD = "import sys, zstandard as z; a, b = open(sys.argv[1], 'rb'), open(sys.argv[2], 'wb')\n"
ZIPNN = (
    "import sys; from zipnn import ZipNN; z = ZipNN(input_format='byte', bytearray_dtype='bfloat16', threads=1)\n"
    "a = open(sys.argv[1], 'rb').read(); "
)


def size(path):
    """Bytes of a file, or of all files below a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def run(command):
    """Seconds of processor time that a command takes, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout)[-800:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# Of each dtype that has exponents: its width, and the lowest bit and the bits of the exponent.
FLOATS = {"BF16": ("<u2", 7, 8), "F16": ("<u2", 10, 5), "F8_E4M3": ("u1", 3, 4), "F8_E5M2": ("u1", 2, 5)}


def entropy(values):
    """Bits of values by their own frequencies."""
    counts = numpy.bincount(values)
    counts = counts[counts > 0].astype(float)
    return float((counts * numpy.log2(counts.sum() / counts)).sum())


def header(file):
    """Bytes before the data of a safetensors file, and its tensors."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        tensors = json.loads(opened.read(length))
    return 8 + length, [tensor for name, tensor in tensors.items() if name != "__metadata__"]


def bounds(file):
    """Shares of a safetensors file that its exponents', and its magnitudes', entropies leave."""
    data = numpy.memmap(file, dtype="u1", mode="r")
    start, tensors = header(file)
    by_exponents = by_magnitudes = 8.0 * start
    for tensor in tensors:
        first, end = tensor["data_offsets"]
        of_tensor = data[start + first : start + end]
        if tensor["dtype"] not in FLOATS or first == end:
            by_exponents += 8 * (end - first)
            by_magnitudes += 8 * (end - first)
            continue
        width, low, bits = FLOATS[tensor["dtype"]]
        words = of_tensor.view(width)
        by_exponents += entropy((words >> low) & ((1 << bits) - 1)) + (8 * words.itemsize - bits) * words.size
        by_magnitudes += entropy(words & ((1 << (low + bits)) - 1)) + words.size
    return by_exponents / 8 / data.size, by_magnitudes / 8 / data.size


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llmpress", type=Path, default=Path("target/release/llmpress"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="TOOL", help="these tools alone")
    args = parser.parse_args()
    weights = args.model / "model.safetensors" if args.model.is_dir() else args.model
    by_exponents, by_magnitudes = bounds(weights)
    print(json.dumps({"bound": "exponents", "share": round(by_exponents, 5)}))
    print(json.dumps({"bound": "magnitudes", "share": round(by_magnitudes, 5)}), flush=True)
    scripts = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        source, packed, back = work / "source", work / "packed", work / "back"
        source.mkdir()
        file = source / "model.safetensors"
        shutil.copyfile(weights, file)
        shutil.copyfile(weights.parent / "config.json", source / "config.json")
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
        if any(tensor["dtype"] == "F8_E4M3" for tensor in header(weights)[1]):
            convert, *others = tools["llmpress archive"]
            tools["llmpress dfloat8"] = ([*convert[:5], "dfloat8", *convert[6:]], *others)
        chosen = {tool: steps for tool, steps in tools.items() if not args.only or tool in args.only}
        for tool, (compress, decompress, verify) in chosen.items():
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
