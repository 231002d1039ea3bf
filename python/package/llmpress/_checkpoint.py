"""Checkpoints as memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _llmpress
from ._jobs import download
from ._llmpress import Buffer, Linear, TensorInfo

if TYPE_CHECKING:
    import numpy
    import torch

#: Rows of the first dimension: `slice(a, b)` or `(a, b)`, the end not included.
Rows = slice | tuple[int, int]


class Checkpoint(Mapping[str, TensorInfo]):
    """An open checkpoint: a mapping from the names of its tensors to what they are.

    Headers, configuration and manifest were read and fit together; nothing is decoded before it is asked for. It may be used from any number of
    threads. Every method lets other Python threads run while it works.
    """

    def __init__(self, inner: _llmpress.Checkpoint) -> None:
        self._inner = inner

    @property
    def root(self) -> Path:
        """The directory, or the file."""
        return Path(self._inner.root)

    @property
    def kind(self) -> str:
        """What it is: "huggingface", "llmpress", "dfloat11" (an official one) or "gguf"."""
        return self._inner.kind

    @property
    def config(self) -> dict[str, Any] | None:
        """`config.json`; `None` where there is none."""
        text = self._inner.config_json
        return None if text is None else json.loads(text)

    @property
    def tied(self) -> dict[str, str]:
        """Tensors that share another one's weights, with the tensor that is stored. These names may be read, too."""
        return self._inner.tied

    @property
    def transforms(self) -> list[str]:
        """What was done to the weights beside storing them, such as "rotation of value". What begins with "online: " is left for whoever runs the
        model to go on with, for every token."""
        return self._inner.transforms

    def __getitem__(self, name: str) -> TensorInfo:
        return self._inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner.keys())

    def __len__(self) -> int:
        return len(self._inner)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._inner

    def __repr__(self) -> str:
        return repr(self._inner)

    def read(self, name: str, rows: Rows | None = None, *, copy: bool | None = None) -> Buffer:
        """A tensor, or rows of it, as memory that NumPy and torch take over without a copy (`__array_interface__`, `__dlpack__`).

        What is stored raw is the file's own bytes, mapped for this process: what is written to them never reaches the file, and the file must not be
        shortened meanwhile. Everything else is decoded into new memory.

        Args:
            name: The tensor.
            rows: Rows of the first dimension; all of them if not given.
            copy: `True` decodes or copies always; `False` refuses what cannot be had without.

        Raises:
            InvalidError: No such tensor (the nearest name is given), rows past the end, no way without a copy.
            CorruptError: What is stored breaks its format.
            IoError: The file cannot be read.
        """
        return self._inner.read(name, rows, copy=copy)

    def numpy(self, name: str, rows: Rows | None = None, *, copy: bool | None = None) -> numpy.ndarray[Any, Any]:
        """A tensor, or rows of it, as a NumPy array, by :meth:`read`.

        The dtype is the tensor's. NumPy has none for BF16 and the kinds of FP8: they have those of the package `ml_dtypes` where it is installed, and are
        unsigned words (`uint16`, `uint8`) where it is not. F4 and F6 are the stored bytes, flat. What is mapped is read-only.
        """
        return self._inner.read(name, rows, copy=copy).numpy()

    def torch(self, name: str, rows: Rows | None = None, *, copy: bool | None = None) -> torch.Tensor:
        """A tensor, or rows of it, as a torch tensor of its own dtype on the processor, by :meth:`read`. F4 and F6 are the stored bytes, flat."""
        return self._inner.read(name, rows, copy=copy).torch()

    def read_into(self, name: str, out: Any, rows: Rows | None = None) -> None:
        """Decodes a tensor, or rows of it, into the caller's memory.

        Args:
            name: The tensor.
            out: A C-contiguous, writable array or tensor (anything with `__dlpack__`) in the processor's memory, as many bytes as the rows have, of the
                tensor's dtype or of unsigned words as large. Any shape.
            rows: Rows of the first dimension; all of them if not given.

        Raises:
            InvalidError: `out` is none of this.
        """
        self._inner.read_into(name, out, rows)

    def gather(self, name: str, rows: Iterable[int]) -> Buffer:
        """Rows of a tensor by their numbers, in this order, decoded: what an embedding does. Shape `[len(rows), ...]`."""
        return self._inner.gather(name, list(rows))

    def components(self, name: str) -> dict[str, Buffer]:
        """The stored tensors of the unit that a tensor is in, by the last part of their names (`docs/format.md`), mapped."""
        return self._inner.components(name)

    def linear(self, name: str) -> Linear:
        """A matrix `[out_features, in_features]` to multiply by on the processor, from the form that it is stored in."""
        return self._inner.linear(name)

    def check_unchanged(self) -> None:
        """Raises `CorruptError` if a file changed since the checkpoint was opened."""
        self._inner.check_unchanged()


def open(
    path: str | PathLike[str], *, base: str | PathLike[str] | None = None, threads: int | None = None, stored: bool = False
) -> Checkpoint:
    """Opens a checkpoint: a directory of Hugging Face, llmpress or official DFloat11, a GGUF file, or `org/name[@revision]` on the hub, which is
    downloaded into the shared cache.

    Args:
        path: Where it is.
        base: The checkpoint that an archive is stored as its difference from (`convert(..., base=...)`), likewise.
        threads: Threads that decode a tensor together; one per processor if not given. With 1 the calling thread does it, and nothing outlives the call.
        stored: Show matrices that another tool quantised as the tensors that it stored, not as the numbers that they stand for.

    Raises:
        IoError: A file is missing or cannot be read.
        CorruptError: Something breaks its format, or parts do not fit together.
        UnsupportedError: A layout that this version does not read.
        InvalidError: A base of a checkpoint that has none.
    """
    base = None if base is None else download(base)
    return Checkpoint(_llmpress.open(download(path), base=base, threads=threads, stored=stored))
