"""How well a model predicts a text, and how far it is from its base."""

from __future__ import annotations

from os import PathLike
from typing import Any

from ._jobs import Pathish, ProgressCallback, _call

__all__ = ["kld", "ppl", "tasks"]


def ppl(
    model: Pathish,
    *,
    text: Pathish,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    bos: str | None = None,
    batch: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
    weights: str | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Perplexity of a checkpoint on a text file, compressed or not. `llmpress eval ppl --json`.

    Args:
        text: A file, UTF-8; encoded as a whole.
        window: Tokens of a window (512). In each, every position but the first is scored.
        stride: Slide the window by so many tokens and score only the new ones.
        limit: Take the first so many windows only.
        device: "cpu", or "cuda", "cuda:1", ...
        weights: How weights lie in memory: "stored", "bf16", "dfloat11" or "fixed12".

    Returns:
        `perplexity`, `perplexity_standard_error`, `nats_per_token`, `bits_per_byte`, `scored_tokens`, `seconds` and more.
    """
    options = _protocol(text, window, stride, limit, bos, batch, jobs, device, weights)
    return _call(["eval", "ppl"], [model], options, progress)


def kld(
    model: Pathish,
    *,
    base: Pathish,
    text: Pathish,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    bos: str | None = None,
    batch: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
    weights: str | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """KL divergence of a checkpoint from its base on a text file, in nats; both run side by side. `llmpress eval kld --json`.

    Returns:
        `kl` and `delta_p` (each with `mean`, `standard_error`, `median`, percentiles, `max`), `same_top`, both perplexities and more.
    """
    options = {"base": base} | _protocol(text, window, stride, limit, bos, batch, jobs, device, weights)
    return _call(["eval", "kld"], [model], options, progress)


def tasks(
    model: Pathish,
    *,
    data: Pathish,
    base: Pathish | None = None,
    limit: int | None = None,
    bos: str | None = None,
    answers: Pathish | None = None,
    batch: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
    weights: str | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Accuracy on questions with choices and on texts to go on from, a JSON object a line. `llmpress eval tasks --json`."""
    options = {
        "data": data,
        "base": base,
        "limit": limit,
        "bos": bos,
        "answers": answers,
        "batch": batch,
        "jobs": jobs,
        "device": device,
        "weights": weights,
    }
    return _call(["eval", "tasks"], [model], options, progress)


def _protocol(
    text: str | PathLike[str],
    window: int | None,
    stride: int | None,
    limit: int | None,
    bos: str | None,
    batch: int | None,
    jobs: int | None,
    device: str | None,
    weights: str | None,
) -> dict[str, Any]:
    return {
        "text": text,
        "window": window,
        "stride": stride,
        "limit": limit,
        "bos": bos,
        "batch": batch,
        "jobs": jobs,
        "device": device,
        "weights": weights,
    }
