"""What can go wrong. The kinds that a caller can act on stay apart."""

from __future__ import annotations

from typing import Any


class LlmpressError(Exception):
    """Any error of llmpress. The message names the file, the tensor and the mend."""


class IoError(LlmpressError, OSError):
    """The operating system refused, or a hub cannot be reached."""


class CorruptError(LlmpressError):
    """The input breaks its format."""


class UnsupportedError(LlmpressError):
    """The input is valid, but this version does not handle it."""


class InvalidError(LlmpressError, ValueError):
    """An argument makes no sense: an unknown tensor, rows past the end, options that do not fit together."""


class LimitError(LlmpressError):
    """More memory, disk or threads would be needed than are allowed."""


class MismatchError(LlmpressError):
    """What was written does not decode to what was read. Nothing was published."""


class HubError(LlmpressError):
    """A hub answers, and not with what was asked for."""


class FindingsError(LlmpressError):
    """Something was checked and is not as it should be: see `report`."""

    #: What was found, as `--json` of the command prints it.
    report: dict[str, Any]


class LlmpressWarning(UserWarning):
    """Something that the user should know though the work goes on."""
