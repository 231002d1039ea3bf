from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy
import torch

__version__: str

class TensorInfo:
    """A tensor: what it is and how it is stored."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """By its name in safetensors, such as "BF16"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""

    @property
    def nbytes(self) -> int:
        """Bytes when decoded."""

    @property
    def encoding(self) -> str:
        """Such as "raw" or "dfloat11"."""

    @property
    def widths(self) -> str | None:
        """What of the encoding says how many bits a weight takes, such as "w4,g128"."""

    @property
    def unit(self) -> str:
        """The unit that it is stored in, alone or with others."""

    @property
    def unit_nbytes(self) -> int:
        """Bytes that the unit takes, those of other tensors in it included."""

class Buffer:
    """A tensor's memory: decoded, or where it lies in the file. NumPy and torch take it over without a copy."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def is_mapped(self) -> bool:
        """Whether it is the file's own bytes and no copy."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __len__(self) -> int: ...
    def numpy(self) -> numpy.ndarray[Any, Any]:
        """The same memory as a NumPy array: BF16 and FP8 as dtypes of `ml_dtypes` where it is installed, else as unsigned words."""

    def torch(self) -> torch.Tensor:
        """The same memory as a torch tensor."""

class Linear:
    """`y = W x` on the processor, where W `[out_features, in_features]` lies as it is stored."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def activation_bits(self) -> int | None:
        """Bits to which its inputs are quantised."""

    def multiply(self, x: Any, out: Any) -> None:
        """Fills `out`, float32 `[tokens, out_features]`, from `x`, float32 `[tokens, in_features]`; both contiguous."""

class Checkpoint:
    @property
    def root(self) -> str | PathLike[str]: ...
    @property
    def kind(self) -> str: ...
    @property
    def config_json(self) -> str | None: ...
    @property
    def tied(self) -> dict[str, str]: ...
    @property
    def transforms(self) -> list[str]: ...
    def keys(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> TensorInfo: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str, rows: Any = None, *, copy: bool | None = None) -> Buffer: ...
    def read_into(self, name: str, out: Any, rows: Any = None) -> None: ...
    def gather(self, name: str, rows: list[int]) -> Buffer: ...
    def components(self, name: str) -> dict[str, Buffer]: ...
    def linear(self, name: str) -> Linear: ...
    def check_unchanged(self) -> None: ...

def open(
    path: str | PathLike[str], *, base: str | PathLike[str] | None = None, threads: int | None = None, stored: bool = False
) -> Checkpoint: ...
def call(
    arguments: list[str],
    progress: Callable[[str, int, int, str], Any] | None,
    warn: Callable[[str], Any],
) -> tuple[str, str | None]: ...
def download(
    path: str | PathLike[str],
    progress: Callable[[str, int, int, str], Any] | None,
    warn: Callable[[str], Any],
) -> str | PathLike[str]: ...
def main(arguments: list[str], itself: str | None) -> int: ...
