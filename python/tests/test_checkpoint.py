"""What is read is what the file holds, whatever stores it and whoever takes the memory."""

from __future__ import annotations

import gc
import json
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

import llmpress

MATRIX = "model.layers.0.self_attn.q_proj.weight"
VECTOR = "model.norm.weight"


def raw_words(directory, name):
    """A BF16 tensor by nothing but the description of safetensors."""
    data = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = entry["data_offsets"]
    return np.frombuffer(data[8 + length + begin : 8 + length + end], "<u2").reshape(entry["shape"])


def words(array):
    return np.asarray(array).view(np.uint16)


def test_a_checkpoint_is_a_mapping_of_what_its_tensors_are(tinylm):
    checkpoint = llmpress.open(tinylm)
    info = checkpoint[MATRIX]
    assert checkpoint.kind == "huggingface" and checkpoint.root == tinylm
    assert MATRIX in checkpoint and "nothing" not in checkpoint and 3 not in checkpoint
    assert list(checkpoint) == sorted(checkpoint) and len(list(checkpoint)) == len(checkpoint)
    assert info.dtype == "BF16" and info.encoding == "raw" and info.widths is None
    assert info.nbytes == 2 * info.shape[0] * info.shape[1] == info.unit_nbytes
    assert checkpoint.config["model_type"] == "llama"


@pytest.mark.parametrize("to", ["dfloat11", "fixed12", "planes", "raw"])
def test_every_lossless_encoding_gives_the_words_of_the_source(tinylm, converted, to):
    for threads in (None, 1, 3):
        checkpoint = llmpress.open(converted(to), threads=threads)
        for name in checkpoint:
            expected = raw_words(tinylm, name)
            assert np.array_equal(words(checkpoint.numpy(name)), expected), (to, name)
        expected = raw_words(tinylm, MATRIX)
        assert np.array_equal(words(checkpoint.numpy(MATRIX, slice(5, 37))), expected[5:37])
        assert np.array_equal(words(checkpoint.numpy(MATRIX, (0, 1))), expected[:1])
        assert checkpoint.numpy(MATRIX, (7, 7)).shape == (0, expected.shape[1])
        assert np.array_equal(words(checkpoint.gather(MATRIX, [9, 0, 9]).numpy()), expected[[9, 0, 9]])


def test_what_lies_raw_is_not_copied_and_what_is_written_to_it_stays_here(tinylm):
    torch = pytest.importorskip("torch")
    checkpoint = llmpress.open(tinylm)
    mapped = checkpoint.read(MATRIX)
    assert mapped.is_mapped and not mapped.numpy().flags.writeable
    address = mapped.__array_interface__["data"][0]
    assert mapped.numpy().ctypes.data == address and mapped.torch().data_ptr() == address
    before = mapped.torch().clone()
    mapped.torch().zero_()
    assert not mapped.torch().any()
    assert torch.equal(checkpoint.torch(MATRIX), before)
    assert np.array_equal(words(checkpoint.numpy(MATRIX)), raw_words(tinylm, MATRIX))
    rows = checkpoint.read(MATRIX, slice(3, 5))
    assert rows.is_mapped and np.array_equal(words(rows.numpy()), raw_words(tinylm, MATRIX)[3:5])
    copied = checkpoint.read(MATRIX, copy=True)
    assert not copied.is_mapped and copied.numpy().flags.writeable


def test_a_copy_that_was_not_wanted_is_refused(converted):
    checkpoint = llmpress.open(converted("dfloat11"))
    with pytest.raises(llmpress.InvalidError, match="without a copy"):
        checkpoint.read(MATRIX, copy=False)


def test_torch_has_bf16_and_numpy_has_its_words(tinylm, converted):
    torch = pytest.importorskip("torch")
    for directory in (tinylm, converted("fixed12")):
        checkpoint = llmpress.open(directory)
        tensor = checkpoint.torch(MATRIX)
        assert tensor.dtype == torch.bfloat16 and tuple(tensor.shape) == checkpoint[MATRIX].shape
        assert np.array_equal(tensor.view(torch.uint16).numpy(), raw_words(tinylm, MATRIX))
        array = checkpoint.numpy(MATRIX)
        try:
            import ml_dtypes
        except ImportError:
            assert array.dtype == np.uint16
        else:
            assert array.dtype == ml_dtypes.bfloat16


def test_memory_outlives_the_checkpoint_and_its_buffer(tinylm, converted):
    torch = pytest.importorskip("torch")
    expected = raw_words(tinylm, MATRIX)
    for directory in (tinylm, converted("dfloat11")):
        array, tensor = llmpress.open(directory).numpy(MATRIX), llmpress.open(directory).torch(MATRIX)
        gc.collect()
        assert np.array_equal(words(array), expected)
        assert np.array_equal(tensor.view(torch.uint16).numpy(), expected)


def test_a_capsule_that_nobody_takes_frees_its_memory(converted):
    buffer = llmpress.open(converted("dfloat11")).read(MATRIX)
    for _ in range(100):
        buffer.__dlpack__()
    with pytest.raises(BufferError):
        buffer.__dlpack__(dl_device=(2, 0))
    assert buffer.__dlpack_device__() == (1, 0)


def test_callers_memory_is_filled(tinylm, converted):
    torch = pytest.importorskip("torch")
    checkpoint = llmpress.open(converted("dfloat11"))
    expected = raw_words(tinylm, MATRIX)
    array = np.zeros(expected.shape, np.uint16)
    checkpoint.read_into(MATRIX, array)
    assert np.array_equal(array, expected)
    tensor = torch.zeros((8, expected.shape[1]), dtype=torch.bfloat16)
    checkpoint.read_into(MATRIX, tensor, slice(8, 16))
    assert np.array_equal(tensor.view(torch.uint16).numpy(), expected[8:16])


def test_memory_that_does_not_fit_is_refused_and_left_alone(converted):
    checkpoint = llmpress.open(converted("dfloat11"))
    rows, columns = checkpoint[MATRIX].shape
    for out, why in [
        (np.zeros((rows, columns - 1), np.uint16), "bytes do not go into"),
        (np.zeros((rows, columns), np.float16), "another dtype"),
        (np.zeros((columns, rows), np.uint16).T, "not contiguous"),
        (np.zeros((rows, 2 * columns), np.uint16)[:, ::2], "not contiguous"),
    ]:
        with pytest.raises(llmpress.InvalidError, match=why):
            checkpoint.read_into(MATRIX, out)
        assert not out.any()
    frozen = np.zeros((rows, columns), np.uint16)
    frozen.flags.writeable = False
    with pytest.raises(BufferError):
        checkpoint.read_into(MATRIX, frozen)
    assert not frozen.any()


def test_components_are_what_is_stored(converted):
    checkpoint = llmpress.open(converted("fixed12"))
    components = checkpoint.components(MATRIX)
    assert {"sign_mantissa", "codes"} <= components.keys()
    assert sum(c.nbytes for c in components.values()) == checkpoint[MATRIX].unit_nbytes
    assert components["sign_mantissa"].is_mapped


def test_a_product_is_that_of_the_decoded_matrix(converted):
    # What is multiplied from codes is not rounded to BF16 first, as what is read is.
    for to, error in [("dfloat11", 1e-5), ("fixed12", 1e-5), ("raw", 1e-5), ("rtn:w4,g64", 2e-2)]:
        checkpoint = llmpress.open(converted(to))
        linear = checkpoint.linear(MATRIX)
        weight = checkpoint.numpy(MATRIX)
        weight = (words(weight).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        for tokens in (0, 1, 3, 50):
            x = np.random.default_rng(tokens).standard_normal((tokens, linear.in_features), dtype=np.float32)
            out = np.full((tokens, linear.out_features), np.nan, np.float32)
            linear.multiply(x, out)
            assert np.allclose(out, x.astype(np.float64) @ weight.T, rtol=error, atol=error), (to, tokens)


THREADS = """
import os, sys, numpy, llmpress
checkpoint = llmpress.open(sys.argv[1], threads=1)
before = len(os.listdir("/proc/self/task"))
for name in checkpoint:
    checkpoint.read(name, copy=True)
print(len(os.listdir("/proc/self/task")) - before)
linear = checkpoint.linear(sys.argv[2])
for _ in range(3):
    linear.multiply(numpy.ones((2, linear.in_features), "f4"), numpy.ones((2, linear.out_features), "f4"))
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_with_one_thread_the_caller_reads_and_one_more_multiplies(converted):
    command = [sys.executable, "-c", THREADS, converted("fixed12"), MATRIX]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["0", "1"]


def test_a_product_refuses_other_shapes(tinylm):
    linear = llmpress.open(tinylm).linear(MATRIX)
    k, n = linear.in_features, linear.out_features
    for x, out in [((2, k + 1), (2, n)), ((2, k), (3, n)), ((2, k), (2, n + 1)), ((k,), (n,))]:
        with pytest.raises(llmpress.InvalidError, match="multiplies"):
            linear.multiply(np.zeros(x, np.float32), np.zeros(out, np.float32))
    both = np.zeros(2 * (k + n), np.float32)
    with pytest.raises(llmpress.InvalidError, match="share memory"):
        linear.multiply(both[: 2 * k].reshape(2, k), both[k : k + 2 * n].reshape(2, n))
    with pytest.raises(llmpress.InvalidError, match="no matrix"):
        llmpress.open(tinylm).linear(VECTOR)


def test_threads_read_side_by_side(tinylm, converted):
    checkpoint = llmpress.open(converted("dfloat11"))
    expected = raw_words(tinylm, MATRIX)
    right = []

    def read():
        right.append(all(np.array_equal(words(checkpoint.numpy(MATRIX)), expected) for _ in range(20)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


def test_errors_say_what_is_wrong_by_their_kind(tinylm, converted, tmp_path):
    checkpoint = llmpress.open(tinylm)
    with pytest.raises(llmpress.InvalidError, match="the nearest is"):
        checkpoint.read("model.norm.weigth")
    with pytest.raises(KeyError, match="the nearest is"):
        checkpoint["model.norm.weigth"]
    for rows in [(0, 10**9), (5, 4)]:
        with pytest.raises(llmpress.InvalidError, match="rows"):
            checkpoint.read(MATRIX, rows)
    with pytest.raises(llmpress.InvalidError, match="step"):
        checkpoint.read(MATRIX, slice(0, 8, 2))
    with pytest.raises(llmpress.InvalidError, match="row"):
        checkpoint.gather(MATRIX, [10**9])
    for threads in (0, 10**6):
        with pytest.raises(llmpress.InvalidError, match="threads"):
            llmpress.open(tinylm, threads=threads)
    with pytest.raises(llmpress.IoError) as missing:
        llmpress.open(tmp_path / "nothing")
    assert isinstance(missing.value, OSError) and isinstance(missing.value, llmpress.LlmpressError)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(llmpress.CorruptError, match="model.safetensors"):
        llmpress.open(tmp_path / "bad")


def test_a_file_that_was_cut_short_is_an_error_and_no_crash(tinylm, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tinylm / name).read_bytes())
    checkpoint = llmpress.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    failed = 0
    for name in checkpoint:
        try:
            checkpoint.read(name)
        except llmpress.CorruptError as error:
            failed += 1
            assert "cut short" in str(error)
    assert failed
    with pytest.raises(llmpress.CorruptError, match="changed"):
        checkpoint.check_unchanged()


def test_a_fine_tune_reads_through_its_base_and_not_without_it(tinylm, tmp_path):
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    tuned.mkdir()
    data = bytearray((tinylm / "model.safetensors").read_bytes())
    data[-2:] = bytes([data[-2] ^ 1, data[-1]])
    (tuned / "model.safetensors").write_bytes(data)
    (tuned / "config.json").write_bytes((tinylm / "config.json").read_bytes())
    llmpress.convert(tuned, out, to="archive", base=tinylm)
    checkpoint = llmpress.open(out, base=tinylm)
    assert len(checkpoint) > 0
    for name in checkpoint:
        assert (words(checkpoint.numpy(name)) == raw_words(tuned, name)).all(), name
    with pytest.raises(llmpress.LlmpressError, match="base"):
        llmpress.open(out).numpy(MATRIX)
    with pytest.raises(llmpress.InvalidError, match="leave --base out|not stored"):
        llmpress.open(tinylm, base=tinylm)
