#!/usr/bin/env python3
"""Golden vectors for the DFloat11 coder, made by the official packer.

    python make_golden.py synthetic                     # *.safetensors beside this script
    python make_golden.py units CHECKPOINT [--unit U ...] [--tensors T ...]    # units.json

Needs Python 3.11 or newer, no GPU, and:

    pip install numpy==2.4.6 torch==2.15.0 safetensors==0.8.0 blake3==1.0.11 dahuffman==0.4.2
    pip install --no-deps dfloat11==0.5.0

Only `dfloat11.dfloat11_utils` is used; it is loaded by its path, because importing the package itself asks for CUDA.
The packer is pure Python and takes about a second per million weights.

synthetic
    Small deterministic cases. `<case>.safetensors` holds the input `words` (U16; the tensors of the unit one after the
    other) and the official components under their published names. The metadata entry `case` is JSON: `about`,
    `elements` of each tensor, `bits` of the stream, `end_code` (of the end symbol), the `fault` below if it shows.

    `long_codes.safetensors` is a unit of millions of weights whose codes reach the 32-bit limit; depth 33 needs more
    than nine million weights, so the input is a recipe: `runs` (U32 [n, 2]: a word and how often it occurs),
    joined to one list L of N words; the unit's word i is L[i * stride mod N]. It holds `luts` in full; the metadata has
    `bytes`, `sha256` and `blake3` of every component.

    `codes.safetensors` holds codes without a stream, for many histograms: `counts` (U64 [cases, 256]), `rows` (U8
    [cases]: rows of the case's `luts`, its row of lengths included, 0 where the packer crashes) and `luts` (U8: all
    tables one after the other).

units
    Digests of whole units of a checkpoint. A unit U is either a tensor (`U.weight` exists), or the `.weight`s of its
    sub-modules (`--tensors`, in this order). Results are merged into units.json, a list of {model, unit,
    tensors, elements, components: {name: {bytes, sha256, blake3}}}.

Where the official packer fails
    1. It crashes (UnboundLocalError in get_luts) if and only if the end symbol's code is all zeros and at most 8 bits
       long, for then row 0 has nothing in column 0: always with one symbol; with steep histograms (every count above the
       sum of the smaller ones) of up to 8 symbols; with 3, 7, 15, 31, 63 or 127 equal counts; and now and then
       otherwise (7 exponents counted 900, 700, 400, 300, 260, 130, 45).
    2. It crashes on an empty unit (StopIteration).
    3. If the last code crosses into a new block of 4096 bytes and ends on a byte, `output_positions` lacks the new
       block's entry: it has nb entries instead of nb + 1 (the last is N in both forms). Cases with this fault
       carry `fault: output_positions`; a correct writer appends N once more. Likewise for windows of 8 bytes: the new
       window's gap stays 0; no code starts in it, so 0 is what the format asks for.
    4. Exponents 240..255, and more than 16 child rows, give tables that cannot be decoded; nothing is reported.
    5. If codes are longer than 32 bits and the k-th and k+1-th rarest counts are equal and above 1, which of them is
       flattened depends on numpy's partition, so on its version and on the CPU. No case here has such a tie.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from safetensors.numpy import save as serialize

HERE = Path(__file__).resolve().parent
BYTES_PER_THREAD = 8
THREADS_PER_BLOCK = 512
WINDOW = 8 * BYTES_PER_THREAD
BLOCK = WINDOW * THREADS_PER_BLOCK
LLAMA_ORDER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
COMPONENTS = ["luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions"]


def load_official():
    """The official module, without its package's __init__ (which needs CUDA) and without progress bars."""
    quiet = types.ModuleType("tqdm")
    quiet.tqdm = lambda items, **_: items
    sys.modules["tqdm"] = quiet
    package = Path(importlib.util.find_spec("dfloat11").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("official_packer", package / "dfloat11_utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OFFICIAL = load_official()
warnings.filterwarnings("ignore", message="The given NumPy array is not writ")


def silently(function, *args):
    """Calls the official code, which prints its tables."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def end_code(table):
    """The code of the end symbol as a string of bits."""
    bits, value = next(code for symbol, code in table.items() if not isinstance(symbol, int))
    return format(value, f"0{bits}b")


def code_of(words):
    """Official code of an array of words: (code, table, lengths by exponent)."""
    counts = silently(OFFICIAL.get_codec, torch.from_numpy(words.view(np.int16)))[1]
    code, _, table = silently(OFFICIAL.get_32bit_codec, counts)
    lengths = np.zeros(256, dtype=np.int64)
    for symbol, (bits, _) in table.items():
        if isinstance(symbol, int):
            lengths[symbol] = bits
    return code, table, lengths


def exponents(words):
    """The exponents of an array of words."""
    return (words >> 7) & 0xFF


def pack(tensors):
    """Official components of a unit (a list of U16 arrays), and the table."""
    code, table, _ = code_of(np.concatenate(tensors))
    luts = silently(OFFICIAL.get_luts, table)
    flat = [torch.from_numpy(t.view(np.int16)).view(torch.bfloat16) for t in tensors]
    encoded, sign_mantissa, positions, gaps, splits = silently(
        OFFICIAL.encode_weights, flat, code, BYTES_PER_THREAD, THREADS_PER_BLOCK
    )
    stored = [luts, encoded, sign_mantissa, positions.view(torch.uint8), gaps, splits]
    return {name: np.ascontiguousarray(t.numpy()) for name, t in zip(COMPONENTS, stored)}, table


def digests(components):
    """Size and digests of every component."""
    out = {}
    for name, array in components.items():
        data = array.tobytes()
        out[name] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "blake3": blake3(data).hexdigest(),
        }
    return out


# Synthetic cases


def bfloat16(values):
    """Words of float32 values, cut (not rounded) to BF16."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def normal(seed, count, scale=0.02):
    """Normal weights, as in a trained matrix."""
    return bfloat16(np.random.Generator(np.random.PCG64(seed)).standard_normal(count) * scale)


def drawn(seed, counts, first=100):
    """Shuffled words whose exponents `first`, `first`+1, ... occur `counts` times; signs and mantissas are random."""
    rng = np.random.Generator(np.random.PCG64(seed))
    exponent = np.repeat(np.arange(first, first + len(counts), dtype=np.uint16), counts)
    rng.shuffle(exponent)
    return (rng.integers(0, 1 << 16, len(exponent), dtype=np.uint16) & 0x807F) | (exponent << 7)


def fibonacci(count):
    """1, 2, 3, 5, ...: with the end symbol's 1 they give the deepest code, a chain."""
    out = [1, 2]
    while len(out) < count:
        out.append(out[-1] + out[-2])
    return out[:count]


def search(about, candidates, holds):
    """The first candidate (a U16 array) that packs and whose (end bit, length of the last code, table) `holds`."""
    for words in candidates:
        _, table, lengths = code_of(words)
        code = end_code(table)
        if "1" not in code and len(code) <= 8:
            continue
        each = lengths[exponents(words)]
        if holds(int(each.sum()), int(each[-1]), table):
            return words
    raise SystemExit(f"no candidate for: {about}")


def normals(around, last=None):
    """Normal units of nearly `around` weights with many seeds; `last`: exponent of an added last word."""
    for seed in range(100_000):
        words = normal(1000 + seed, around + seed % 97)
        yield words if last is None else np.append(words, np.uint16(0x8000 | last << 7 | seed % 128))


def crosses(edge, aligned):
    """Says whether the last code starts before and ends after a multiple of `edge` bits, and how it ends."""

    def holds(end, last, _):
        over = end % edge
        return 0 < over < last and (end % 8 == 0) == aligned

    return holds


def carried(table):
    """Whether a child row has nothing in its first column, so that the previous row's last value shows in it."""
    code = end_code(table)
    at = 8 * ((len(code) - 1) // 8)
    return at > 0 and "1" not in code[at:]


def synthetic_cases():
    """Yields (name, about, list of tensors)."""
    for count in [1000, 4096, 50_000]:
        yield f"normal_{count}", f"{count} normal weights", [normal(count, count)]
    # With steeper counts, [900, 700, 400, 300, 260, 130, 45] say, the packer crashes (1. above).
    yield "alphabet_7", "7 exponents", [drawn(7, [900, 700, 400, 300, 45, 44, 43])]
    yield "alphabet_20", "20 exponents", [drawn(20, [3 + 17 * i for i in range(20)])]
    yield "alphabet_40", "40 exponents, many of them once or twice", [drawn(40, [1 + i * i // 8 for i in range(40)])]
    yield "peaked", "18 exponents with Fibonacci counts: codes of up to 18 bits, three levels of rows", [
        drawn(18, fibonacci(18))
    ]
    special = np.array([0, 0x8000, 1, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x77FF, 0xF7FF], dtype=np.uint16)
    yield "special", "normal weights, zeros of both signs, denormals, and exponent 239, the highest there can be", [
        np.concatenate([normal(3, 1500), special, np.zeros(60, np.uint16), normal(4, 1500)])
    ]
    yield "tensors_5", "five tensors, one of a single element", [
        normal(50 + i, count, scale) for i, (count, scale) in enumerate([(700, 0.02), (1, 0.1), (333, 0.05), (64, 1.0), (1200, 0.004)])
    ]
    yield "one_window", "few weights: one window", [drawn(5, [4, 3, 2, 2, 1])]

    tail = "the stream ends "
    about = tail + "on a byte inside a window"
    yield "end_aligned", about, [search(about, normals(900), lambda e, last, _: e % 8 == 0 and e % WINDOW >= last)]
    about = tail + "inside a byte inside a window; the end symbol's code is cut"
    yield "end_unaligned", about, [search(about, normals(900), lambda e, last, _: e % 8 in (3, 4) and e % WINDOW >= last)]
    about = tail + "inside a byte; the end symbol's code is shorter than the rest, which zeros fill"
    candidates = (drawn(seed, [2 + seed % 3, 2, 2, 2, 3, 3], first=118) for seed in range(1000))
    yield "end_zeros", about, [
        search(about, candidates, lambda e, _, t: e % 8 and len(end_code(t)) < 8 - e % 8 and "1" in end_code(t))
    ]
    about = tail + "on a window's edge"
    yield "end_on_window", about, [search(about, normals(900), lambda e, *_: e % WINDOW == 0)]
    about = tail + "on a block's edge"
    yield "end_on_block", about, [search(about, normals(12_640), lambda e, *_: e % BLOCK == 0)]
    for edge, name, count in [(WINDOW, "window", 900), (BLOCK, "block", 12_640)]:
        for aligned in [True, False]:
            about = f"the last code crosses a {name}'s edge and ends {'on' if aligned else 'inside'} a byte"
            words = search(about, normals(count, last=90), crosses(edge, aligned))
            yield f"cross_{name}_{'aligned' if aligned else 'unaligned'}", about, [words]
    about = "a child row with nothing in its first column: the previous row's last value is carried into it"
    yield "carried", about, [search(about, normals(700), lambda e, _, t: carried(t))]


def save(arrays, path, case):
    """Writes a safetensors file with the case as its only metadata."""
    path.write_bytes(serialize(arrays, metadata={"case": json.dumps(case)}))


def write_case(name, about, tensors, out):
    """Packs a case and writes its file."""
    words = np.concatenate(tensors)
    components, table = pack(tensors)
    lengths = code_of(words)[2]
    bits = int(lengths[exponents(words)].sum())
    case = {"about": about, "elements": [len(t) for t in tensors], "bits": bits, "end_code": end_code(table)}
    blocks = -(-len(components["encoded_exponent"]) // (BLOCK // 8))
    if len(components["output_positions"]) != 4 * (blocks + 1):
        case["fault"] = "output_positions"
    save({"words": words} | components, out / f"{name}.safetensors", case)
    longest = int(lengths.max())
    print(f"{name:24} {len(words):6} words {bits:7} bits {components['luts'].shape[0] - 1} rows, codes to {longest}", case.get("fault", ""))


def write_long_codes(out):
    """A unit whose codes need the limit of 32 bits."""
    counts = [1] + fibonacci(35)[1:]
    runs = np.array([((100 + i) << 7 | (37 * i) % 128 | (i % 2) << 15, c) for i, c in enumerate(counts)], dtype=np.uint32)
    words = np.repeat(runs[:, 0], runs[:, 1]).astype(np.uint16)
    stride = 7_654_321
    assert np.gcd(stride, len(words)) == 1
    words = words[np.arange(len(words), dtype=np.int64) * stride % len(words)]
    symbols = {100 + i: c for i, c in enumerate(counts)}
    plain = OFFICIAL.HuffmanCodec.from_frequencies(symbols).get_code_table()
    components, table = pack([words])
    case = {
        "about": "Fibonacci counts: plain Huffman codes would be longer than 32 bits",
        "elements": [len(words)],
        "stride": stride,
        "plain_longest": max(bits for bits, _ in plain.values()),
        "end_code": end_code(table),
        "components": digests(components),
    }
    save({"runs": runs, "luts": components["luts"]}, out / "long_codes.safetensors", case)
    print(f"long_codes: {len(words)} words, plain codes to {case['plain_longest']}")


def histograms():
    """Count vectors of 256 for codes.safetensors; no ties above 1 where the limit acts."""
    rng = np.random.Generator(np.random.PCG64(11))

    def at(counts, first=100):
        out = np.zeros(256, dtype=np.uint64)
        out[first : first + len(counts)] = counts
        return out

    for count in [33, 34, 36, 40, 48, 60]:
        yield at(fibonacci(count))
        yield at(fibonacci(count)[::-1], first=60)
        yield at(rng.permutation(np.array(fibonacci(count), dtype=np.uint64)), first=170)
        yield at(rng.permutation(np.array([1] * 5 + fibonacci(count)[1:], dtype=np.uint64)), first=3)
    for count in [33, 45, 60]:
        yield at([int(1.5**i) + 3 * i + 1 for i in range(count)])
        yield at(rng.permutation(np.array([int(1.9**i) + i + 1 for i in range(min(count, 50))], dtype=np.uint64)))
    for _ in range(40):
        count = int(rng.integers(6, 120))
        yield at((2.0 ** rng.uniform(0, rng.integers(4, 30), count)).astype(np.uint64), first=int(rng.integers(0, 120)))
    for count in [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 31, 32, 64, 128, 240]:
        yield at([9] * count, first=0)
        yield at([1] * count, first=0)
    for count in range(1, 13):
        yield at([3**i for i in range(count)])


def write_codes(out):
    """Codes of many histograms, without a stream."""
    counts, rows, tables, limited = [], [], [], 0
    for histogram in histograms():
        symbols = {int(i): int(histogram[i]) for i in np.flatnonzero(histogram)}
        plain = max(b for b, _ in OFFICIAL.HuffmanCodec.from_frequencies(symbols).get_code_table().values())
        if plain > 32:
            above = [c for c in symbols.values() if c > 1]
            assert len(set(above)) == len(above), "a tie makes the limited code depend on numpy"
            limited += 1
        table = silently(OFFICIAL.get_32bit_codec, symbols)[2]
        try:
            luts = silently(OFFICIAL.get_luts, table).numpy()
        except UnboundLocalError:
            luts = np.zeros((0, 256), dtype=np.uint8)
        if len(luts) > 18:
            continue  # more child rows than there are pointers: the tables mean nothing
        counts.append(histogram)
        rows.append(len(luts))
        tables.append(luts.reshape(-1))
    arrays = {"counts": np.stack(counts), "rows": np.array(rows, dtype=np.uint8), "luts": np.concatenate(tables)}
    save(arrays, out / "codes.safetensors", {"about": "official codes of many histograms"})
    print(f"codes: {len(rows)} histograms, {limited} need the 32-bit limit, the packer crashes on {rows.count(0)}")


def synthetic(args):
    """The `synthetic` command."""
    for name, about, tensors in synthetic_cases():
        write_case(name, about, tensors, args.out)
    write_codes(args.out)
    if not args.skip_long:
        write_long_codes(args.out)


# Units of checkpoints


def open_checkpoint(directory):
    """name -> (file, offset of data, header entry) of every tensor."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors |= {name: (path, 8 + length, entry) for name, entry in header.items()}
    return tensors


def read_words(tensors, name):
    """The words of a BF16 tensor, flat."""
    path, data, entry = tensors[name]
    if entry["dtype"] != "BF16":
        raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
    begin, end = entry["data_offsets"]
    return np.fromfile(path, dtype="<u2", count=(end - begin) // 2, offset=data + begin)


def units(args):
    """The `units` command."""
    tensors = open_checkpoint(args.checkpoint)
    model = args.name or args.checkpoint.resolve().name
    blocks = {".".join(name.split(".")[:3]) for name in tensors if name.startswith("model.layers.")}
    wanted = args.unit or sorted(blocks, key=lambda name: int(name.rsplit(".", 1)[1]))
    known = {}
    if args.json.exists():
        known = {(entry["model"], entry["unit"]): entry for entry in json.loads(args.json.read_text())}
    for unit in wanted:
        own = f"{unit}.weight"
        names = [own] if own in tensors else [f"{unit}.{part}.weight" for part in args.tensors]
        parts = [read_words(tensors, name) for name in names]
        components, _ = pack(parts)
        elements = sum(len(part) for part in parts)
        known[model, unit] = {
            "model": model,
            "unit": unit,
            "tensors": names,
            "elements": elements,
            "components": digests(components),
        }
        total = sum(array.nbytes for array in components.values())
        print(f"{model} {unit}: {elements} elements, {8 * total / elements:.4f} bits each", flush=True)
        args.json.write_text(json.dumps(list(known.values()), indent=1) + "\n")


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("synthetic", help="small cases with all bytes")
    sub.add_argument("--out", type=Path, default=HERE)
    sub.add_argument("--skip-long", action="store_true", help="leave long_codes out (it takes a minute)")
    sub.set_defaults(run=synthetic)
    sub = commands.add_parser("units", help="digests of whole units of a checkpoint")
    sub.add_argument("checkpoint", type=Path, help="directory of safetensors files")
    sub.add_argument("--name", help="model's name in the result (default: the directory's)")
    sub.add_argument("--unit", action="append", help="module name, repeatable (default: every model.layers.N)")
    sub.add_argument("--tensors", nargs="+", default=LLAMA_ORDER, help="ordered sub-modules of a unit")
    sub.add_argument("--json", type=Path, default=HERE / "units.json")
    sub.set_defaults(run=units)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
