"""Tensors that are decoded where they are copied to.

    loaded_weight.narrow(0, rank * size, size)   -> a Stored of those rows: nothing is decoded
    param.data.copy_(that)                       -> those rows are decoded, into the parameter

The weight loaders of vLLM cut a rank's part from each tensor that they are given and copy it to its place in a layer. What they are given here
remembers the cuts, so the part of a rank is all that is decoded, some rows at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from .._checkpoint import Checkpoint
from .._errors import UnsupportedError

#: Decoded bytes that are there beside the destination at most, where a copy goes through memory of its own.
PIECE_BYTES = 64 << 20
#: Rows of a matrix that encodings store together at most.
TILE_ROWS = 16

aten = torch.ops.aten


class Part(NamedTuple):
    """Rows and columns of a tensor of a checkpoint; ends are not included."""

    checkpoint: Checkpoint
    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def is_whole(self) -> bool:
        shape = self.checkpoint[self.name].shape
        return self.rows == (0, shape[0]) and self.columns == (0, shape[-1])

    def copy_to(self, out: torch.Tensor) -> None:
        """Decodes into `out`: `[rows, ..., columns]`, of any dtype, on any device."""
        first, end = self.rows
        if first == end or out.numel() == 0:
            return
        info = self.checkpoint[self.name]
        whole_rows = self.columns == (0, info.shape[-1])
        dtype = self.checkpoint.torch(self.name, (0, 0)).dtype
        if whole_rows and info.encoding != "raw" and out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
            self.checkpoint.read_into(self.name, out.detach().as_subclass(torch.Tensor), self.rows)
            return
        # An item of a stack is many rows.
        tile = TILE_ROWS if len(info.shape) == 2 else 1
        step = max(PIECE_BYTES * info.shape[0] // info.nbytes // tile, 1) * tile
        at = first
        while at < end:
            stop = min(at - at % step + step, end)
            decoded = self.checkpoint.torch(self.name, (at, stop))
            out[at - first : stop - first].copy_(decoded[..., slice(*self.columns)])
            at = stop


class Stored(torch.Tensor):
    """A tensor of a checkpoint, of two dimensions or more, that is decoded when its numbers are needed.

    Slices of its rows, of a matrix's columns, and single items of a stack stay undecoded; `copy_` from it decodes into the destination; any other
    operation is done with a decoded copy. It cannot be written to.
    """

    part: Part
    #: Whether it is one item of a stack: `part` has one row, which is no dimension of this tensor.
    is_item: bool

    @staticmethod
    def __new__(cls, part: Part, dtype: torch.dtype, is_item: bool = False) -> Stored:
        shape = list(part.checkpoint[part.name].shape)
        shape[0] = part.rows[1] - part.rows[0]
        shape[-1] = part.columns[1] - part.columns[0]
        self = torch.Tensor._make_wrapper_subclass(cls, shape[1:] if is_item else shape, dtype=dtype, device=torch.device("cpu"))
        self.part, self.is_item = part, is_item
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"<Stored {self.part.name}: {self.dtype} {tuple(self.shape)}, rows {self.part.rows}, columns {self.part.columns}>"

    def copy_to(self, out: torch.Tensor) -> None:
        """Decodes into `out`, of this shape."""
        self.part.copy_to(out.unsqueeze(0) if self.is_item else out)

    def decoded(self) -> torch.Tensor:
        """Its numbers, in new memory."""
        out = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.copy_to(out)
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keep = _UNDECODED.get(func)
        if keep is not None:
            kept = keep(*args, **kwargs)
            if kept is not None:
                return kept
        for argument, value in zip(func._schema.arguments, args):
            if isinstance(value, Stored) and argument.alias_info is not None and argument.alias_info.is_write:
                raise UnsupportedError(f"{value.part.checkpoint.root}: {value.part.name}: {func} would write to a stored tensor: copy it first")
        args, kwargs = tree_map(lambda value: value.decoded() if isinstance(value, Stored) else value, (args, kwargs))
        return func(*args, **kwargs)


def _same(tensor: Stored) -> Stored:
    return Stored(tensor.part, tensor.dtype, tensor.is_item)


def _slice(tensor: Stored, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Stored | None:
    dims = tensor.dim()
    dim = dim % dims
    if tensor.is_item or step != 1 or dim not in (0, 1) or (dim == 1 and dims != 2):
        return None
    first, stop, _ = slice(start, end).indices(tensor.shape[dim])
    offset = (tensor.part.columns if dim else tensor.part.rows)[0]
    cut = (offset + first, offset + max(first, stop))
    return Stored(tensor.part._replace(columns=cut) if dim else tensor.part._replace(rows=cut), tensor.dtype)


def _select(tensor: Stored, dim: int, index: int) -> Stored | None:
    dims, count = tensor.dim(), tensor.shape[dim]
    if tensor.is_item or dim % dims != 0 or dims < 3 or not -count <= index < count:
        return None
    row = tensor.part.rows[0] + index % count
    return Stored(tensor.part._replace(rows=(row, row + 1)), tensor.dtype, is_item=True)


def _copy(out: torch.Tensor, source: Any, non_blocking: bool = False) -> torch.Tensor | None:
    if isinstance(out, Stored) or not isinstance(source, Stored) or out.shape != source.shape:
        return None
    if out.is_meta:
        record = getattr(_recording, "record", None)
        if record is not None:
            record(out, source)
    else:
        source.copy_to(out)
    return out


#: What is done without decoding; `None` where it cannot be.
_UNDECODED: dict[Any, Callable[..., torch.Tensor | None]] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.copy_.default: _copy,
}

_recording = threading.local()


@contextlib.contextmanager
def recording(record: Callable[[torch.Tensor, Stored], None]) -> Iterator[None]:
    """While it lasts, `record(out, source)` is told what this thread copies to the meta device, where there is nothing to decode into."""
    _recording.record = record
    try:
        yield
    finally:
        _recording.record = None


def stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint for a weight loader: vectors and numbers as they are, everything larger as a `Stored`."""
    shape = checkpoint[name].shape
    if len(shape) < 2 or 0 in shape:
        return checkpoint.torch(name)
    none = checkpoint.torch(name, (0, 0))
    if none.dim() != len(shape):
        # torch has no such dtype: the stored bytes, flat.
        return checkpoint.torch(name)
    return Stored(Part(checkpoint, name, (0, shape[0]), (0, shape[-1])), none.dtype)
