"""Makes checkpoints of large language models smaller, runs them, and proves that they are still the same model.

    >>> import llmpress
    >>> llmpress.convert("MODEL", "OUT", to="dfloat11")
    >>> checkpoint = llmpress.open("OUT")
    >>> checkpoint.numpy("model.norm.weight")

`import llmpress.transformers` teaches transformers to load what llmpress made; vLLM finds its plug-in, `llmpress.vllm`, by itself.
"""

from ._checkpoint import Checkpoint, open
from ._errors import (
    CorruptError,
    FindingsError,
    HubError,
    InvalidError,
    IoError,
    LimitError,
    LlmpressError,
    LlmpressWarning,
    MismatchError,
    UnsupportedError,
)
from ._jobs import Progress, convert, diff, download, export, inspect, plan, rank, restore, verify
from ._llmpress import Buffer, Linear, TensorInfo, __version__
from . import eval

__all__ = [
    "Buffer",
    "Checkpoint",
    "CorruptError",
    "FindingsError",
    "HubError",
    "InvalidError",
    "IoError",
    "LimitError",
    "Linear",
    "LlmpressError",
    "LlmpressWarning",
    "MismatchError",
    "Progress",
    "TensorInfo",
    "UnsupportedError",
    "__version__",
    "convert",
    "diff",
    "download",
    "eval",
    "export",
    "inspect",
    "open",
    "plan",
    "rank",
    "restore",
    "verify",
]
