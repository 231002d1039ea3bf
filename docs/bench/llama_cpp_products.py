#!/usr/bin/env python3
"""Times llama.cpp's products from Q4_0 and Q8_0 weights, on one core: the peer of the arbitrary-bit kernels.

    taskset -c 0 python3 llama_cpp_products.py BINS [--rows 4096] [--cols 4096] [--tokens 1,16] [--working-set 268435456]

BINS is the directory with `libggml*.so`, as the npm package brings it prebuilt:

    npm install @node-llama-cpp/linux-x64@3.22.1
    BINS=node_modules/@node-llama-cpp/linux-x64/bins/linux-x64

For every line on its standard input the program makes one round and prints one JSON array of {name, tokens, seconds,
bytes}: the time of one product, and the bytes of its weights. With a terminal or nothing as input it makes five rounds. `cargo bench
-p llmpress-kernels --bench abq` drives it so, in turn with our own products (LLMPRESS_PEER).

llama.cpp chooses the library for this processor itself. Weights lie once as a file has them ("plain") and once as it regroups
them at load where it can ("repacked"): the better one is its product. Each is multiplied by F32 activations, which it quantises to 8 bits
within the time, which is what its thread had on its core. As many copies of the matrix as fill the working set take turns, so each is found in memory, not in a cache.
Before timing, one product of each kind is compared with the same product by plain arithmetic. Python 3.11 or newer, nothing else.
"""

import argparse
import array
import ctypes as c
import json
import random
import sys
import time
from pathlib import Path

F32 = 0
KINDS = {"Q4_0": 2, "Q8_0": 8}
CPU = 0


class InitParams(c.Structure):
    _fields_ = [("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool)]


def load(bins):
    """The libraries, with the signatures that are used here."""
    base = c.CDLL(str(bins / "libggml-base.so"), mode=c.RTLD_GLOBAL)
    registry = c.CDLL(str(next(bins.glob("libggml.*"))), mode=c.RTLD_GLOBAL)
    pointer, size, integer = c.c_void_p, c.c_size_t, c.c_int

    class Ggml:
        pass

    ggml = Ggml()
    for library, name, result, arguments in [
        (registry, "ggml_backend_load_all_from_path", None, [c.c_char_p]),
        (registry, "ggml_backend_dev_by_type", pointer, [integer]),
        (registry, "ggml_backend_init_by_type", pointer, [integer, c.c_char_p]),
        (base, "ggml_backend_dev_backend_reg", pointer, [pointer]),
        (base, "ggml_backend_dev_buffer_type", pointer, [pointer]),
        (base, "ggml_backend_dev_supports_op", c.c_bool, [pointer, pointer]),
        (base, "ggml_backend_reg_get_proc_address", pointer, [pointer, c.c_char_p]),
        (base, "ggml_backend_buft_name", c.c_char_p, [pointer]),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
        (base, "ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
        (base, "ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
        (base, "ggml_backend_graph_compute", integer, [pointer, pointer]),
        (base, "ggml_init", pointer, [InitParams]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, integer, c.c_int64, c.c_int64]),
        (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        (base, "ggml_new_graph_custom", pointer, [pointer, size, c.c_bool]),
        (base, "ggml_build_forward_expand", None, [pointer, pointer]),
        (base, "ggml_quantize_chunk", size, [integer, pointer, pointer, c.c_int64, c.c_int64, c.c_int64, pointer]),
        (base, "ggml_row_size", size, [integer, c.c_int64]),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        setattr(ggml, name.removeprefix("ggml_"), function)
    return ggml


class Product:
    """One kind of weights, placed in one kind of buffer, with its graphs of one product a copy."""

    def __init__(self, ggml, device, backend, name, kind, buft, host, weights, x, args):
        self.ggml, self.backend, self.name = ggml, backend, name
        self.bytes = ggml.row_size(kind, args.cols) * args.rows
        self.copies = max(1, -(-args.working_set // self.bytes))
        self.args = args
        context = lambda: ggml.init(InitParams(1 << 20, None, True))
        matrices = context()
        self.matrices = [ggml.new_tensor_2d(matrices, kind, args.cols, args.rows) for _ in range(self.copies)]
        if not ggml.backend_alloc_ctx_tensors_from_buft(matrices, buft):
            raise SystemExit(f"{name}: no memory for the weights")
        # A buffer that does not regroup this kind would not know what to do with it.
        op = ggml.mul_mat(matrices, self.matrices[0], ggml.new_tensor_2d(matrices, F32, args.cols, 1))
        self.supported = ggml.backend_dev_supports_op(device, op)
        if not self.supported:
            return
        packed = c.create_string_buffer(self.bytes)
        ggml.quantize_chunk(kind, weights, packed, 0, args.rows, args.cols, None)
        for matrix in self.matrices:
            ggml.backend_tensor_set(matrix, packed, 0, self.bytes)
        self.graphs = {}
        for tokens in args.tokens:
            values = context()
            inputs = ggml.new_tensor_2d(values, F32, args.cols, tokens)
            outputs = [ggml.mul_mat(values, matrix, inputs) for matrix in self.matrices]
            ggml.backend_alloc_ctx_tensors_from_buft(values, host)
            ggml.backend_tensor_set(inputs, x, 0, 4 * args.cols * tokens)
            graph = ggml.new_graph_custom(context(), self.copies + 8, False)
            for output in outputs:
                ggml.build_forward_expand(graph, output)
            self.graphs[tokens] = (graph, outputs)

    def seconds(self, tokens):
        start = time.thread_time()
        if self.ggml.backend_graph_compute(self.backend, self.graphs[tokens][0]) != 0:
            raise SystemExit(f"{self.name}: the product failed")
        return (time.thread_time() - start) / self.copies

    def check(self, rows, x):
        """Whether the first and the last row of the first and last token are what they should be, nearly."""
        tokens, cols = self.args.tokens[-1], self.args.cols
        self.seconds(tokens)
        out = (c.c_float * (self.args.rows * tokens))()
        for output in {self.graphs[tokens][1][0], self.graphs[tokens][1][-1]}:
            self.ggml.backend_tensor_get(output, out, 0, c.sizeof(out))
            for token in (0, tokens - 1):
                part = x[token * cols : (token + 1) * cols]
                for row in (0, self.args.rows - 1):
                    weights = rows[row * cols : (row + 1) * cols]
                    exact = sum(a * b for a, b in zip(weights, part))
                    scale = sum((a * b) ** 2 for a, b in zip(weights, part)) ** 0.5
                    if abs(out[token * self.args.rows + row] - exact) > scale / 2:
                        raise SystemExit(f"{self.name}: row {row}, token {token} is wrong")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bins", type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--tokens", type=lambda s: [int(n) for n in s.split(",")], default=[1, 16])
    parser.add_argument("--working-set", type=int, default=256 << 20, dest="working_set")
    args = parser.parse_args()
    bins = args.bins.resolve()
    ggml = load(bins)
    ggml.backend_load_all_from_path(str(bins).encode())
    device = ggml.backend_dev_by_type(CPU)
    backend = ggml.backend_init_by_type(CPU, None)
    registered = ggml.backend_dev_backend_reg(device)
    threads = ggml.backend_reg_get_proc_address(registered, b"ggml_backend_set_n_threads")
    c.CFUNCTYPE(None, c.c_void_p, c.c_int)(threads)(backend, 1)
    plain = ggml.backend_dev_buffer_type(device)
    buffers = {"plain": plain}
    extra = ggml.backend_reg_get_proc_address(registered, b"ggml_backend_dev_get_extra_bufts")
    if extra:
        list_of = c.CFUNCTYPE(c.POINTER(c.c_void_p), c.c_void_p)(extra)(device)
        i = 0
        while list_of and list_of[i]:
            if b"REPACK" in ggml.backend_buft_name(list_of[i]):
                buffers["repacked"] = list_of[i]
            i += 1
    seeded = random.Random(1)
    some = array.array("f", (seeded.gauss(0, 0.02) for _ in range(61 * args.cols)))
    rows = (some * (args.rows // 61 + 1))[: args.rows * args.cols]
    x = array.array("f", (seeded.gauss(0, 1) for _ in range(max(args.tokens) * args.cols)))
    address = lambda values: c.c_void_p(values.buffer_info()[0])
    products = [
        Product(ggml, device, backend, f"{kind}, {place}", number, buft, plain, address(rows), address(x), args)
        for kind, number in KINDS.items()
        for place, buft in buffers.items()
    ]
    products = [product for product in products if product.supported]
    for product in products:
        product.check(rows, x)
    print(json.dumps([p.name for p in products]), flush=True)
    for _ in range(5) if sys.stdin is None or sys.stdin.isatty() else sys.stdin:
        print(
            json.dumps([
                {"name": p.name, "tokens": tokens, "seconds": p.seconds(tokens), "bytes": p.bytes}
                for tokens in args.tokens
                for p in products
            ]),
            flush=True,
        )


if __name__ == "__main__":
    main()
