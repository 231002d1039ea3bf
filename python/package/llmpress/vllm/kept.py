"""Matrices that stay compressed, and the operations that compute with them.

    llmpress::linear     x [..., in] -> [..., rows]    products of llmpress, one for each matrix of a fused layer
    llmpress::embedding  ids [...]   -> [..., dim]     rows, decoded when they are asked for

Both are operators of torch, which torch.compile takes as they are. A layer's matrices are named by a number in a tensor: what is compiled and cached for
one process holds none of another's.
"""

from __future__ import annotations

import itertools
import weakref
from typing import NamedTuple

import torch

from .._errors import InvalidError
from .stored import Part


class Placed(NamedTuple):
    """A part of a tensor, and the first row of a layer's weight that it fills."""

    row: int
    part: Part

    @property
    def end(self) -> int:
        return self.row + self.part.rows[1] - self.part.rows[0]

    def followed_by(self, other: Placed) -> Placed | None:
        """Both as one, where they are next to each other in the tensor and in the layer."""
        first, end = self.part.rows
        if other.row != self.end or other.part != self.part._replace(rows=(end, other.part.rows[1])):
            return None
        return Placed(self.row, self.part._replace(rows=(first, other.part.rows[1])))


class Kept:
    """The matrices of a layer whose weight is `[rows, columns]`. Rows that none of them fills are zero."""

    def __init__(self, placed: list[Placed], rows: int, *, multiplies: bool) -> None:
        self.placed = placed
        self.rows = rows
        self.products = [(each, each.part.checkpoint.linear(each.part.name)) for each in placed] if multiplies else []

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T`: `[..., columns]` to `[..., rows]`, computed in float32, in the dtype of `x`."""
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
        out = flat.new_zeros(flat.shape[0], self.rows)
        for placed, product in self.products:
            if product.out_features == self.rows:
                product.multiply(flat, out)
            else:
                part = flat.new_empty(flat.shape[0], product.out_features)
                product.multiply(flat, part)
                out[:, placed.row : placed.end] = part
        return out.to(x.dtype).reshape(*x.shape[:-1], self.rows)

    def gather(self, ids: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of an embedding by their numbers in this layer: `[...]` to `[..., dim]`."""
        (placed,) = self.placed
        first, end = placed.part.rows
        rows = [first + each for each in ids.reshape(-1).tolist()]
        if any(not first <= each < end for each in rows):
            raise InvalidError(f"{placed.part.name}: a token past the {end - first} rows that this rank has")
        found = placed.part.checkpoint.gather(placed.part.name, rows).torch()
        return found.to(dtype).reshape(*ids.shape, dim)


_kept: dict[int, Kept] = {}
_handles = itertools.count()


def keep(layer: torch.nn.Module, kept: Kept) -> torch.Tensor:
    """Keeps matrices as long as a layer lives. Gives the tensor that the operators know them by."""
    handle = next(_handles)
    _kept[handle] = kept
    weakref.finalize(layer, _kept.pop, handle, None)
    return torch.tensor([handle], dtype=torch.int64, device="cpu")


@torch.library.custom_op("llmpress::linear", mutates_args=(), device_types="cpu")
def linear(x: torch.Tensor, handle: torch.Tensor, rows: int) -> torch.Tensor:
    return _kept[int(handle)].multiply(x)


@linear.register_fake
def _(x: torch.Tensor, handle: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("llmpress::embedding", mutates_args=(), device_types="cpu")
def embedding(ids: torch.Tensor, handle: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return _kept[int(handle)].gather(ids, dim, dtype)


@embedding.register_fake
def _(ids: torch.Tensor, handle: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty(*ids.shape, dim, dtype=dtype)
