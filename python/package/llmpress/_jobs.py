"""The jobs of the command as functions: the same options by the same names, the result that `--json` prints, exceptions for failures."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from . import _llmpress
from ._errors import FindingsError, LlmpressWarning

Pathish = str | PathLike[str]


class Progress(NamedTuple):
    """How far a part of a job is."""

    #: What is done, such as "convert" or "download".
    verb: str
    #: How much of it is done.
    done: int
    #: How much there is.
    total: int
    #: What both are counted in: "bytes", "windows", "passes", "endings", "weights" or "tokens".
    unit: str


ProgressCallback = Callable[[Progress], Any]


def _warn(message: str) -> None:
    warnings.warn(message, LlmpressWarning, stacklevel=4)


def _teller(progress: ProgressCallback | None) -> Callable[[str, int, int, str], None] | None:
    if progress is None:
        return None
    return lambda verb, done, total, unit: progress(Progress(verb, done, total, unit)) and None


def _arguments(verb: list[str], places: list[Pathish], options: dict[str, Any]) -> list[str]:
    """What the command would be given: an option that is `None`, `False` or an empty list is left out."""
    arguments = list(verb)
    for name, value in options.items():
        flag = "--" + name.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            arguments.append(flag)
        elif isinstance(value, (str, bytes, int, float, PathLike)):
            arguments.append(f"{flag}={os.fsdecode(value) if isinstance(value, (bytes, PathLike)) else value}")
        else:
            arguments.extend(f"{flag}={os.fspath(each)}" for each in value)
    return [*arguments, "--", *(os.fspath(place) for place in places)]


def _call(verb: list[str], places: list[Pathish], options: dict[str, Any], progress: ProgressCallback | None) -> dict[str, Any]:
    result, findings = _llmpress.call(_arguments(verb, places, options), _teller(progress), _warn)
    report: dict[str, Any] = json.loads(result)
    if findings is not None:
        error = FindingsError(findings)
        error.report = report
        raise error
    return report


def _rules(rules: Any) -> list[str]:
    return [f"{tensors}={to}" for tensors, to in rules.items()] if isinstance(rules, dict) else list(rules)


def _recipe(
    to: str | None,
    recipe: Pathish | None,
    base: Pathish | None,
    rules: dict[str, str] | Iterable[str],
    max_shard_size: int | str | None,
    ranking: Iterable[Pathish],
    portable: bool,
    pattern_file: Pathish | None,
    tied_embedding: bool,
    entropy_code: bool,
    target_bits: float | None,
    target_ratio: float | None,
    epochs: int | None,
    seed: int | None,
) -> dict[str, Any]:
    return {
        "to": to,
        "recipe": None if recipe is None else os.fspath(recipe),
        "base": base,
        "rule": _rules(rules),
        "max_shard_size": max_shard_size,
        "ranking": _paths(ranking),
        "portable": portable,
        "pattern_file": pattern_file,
        "tied_embedding": tied_embedding,
        "entropy_code": entropy_code,
        "target_bits": target_bits,
        "target_ratio": target_ratio,
        "epochs": epochs,
        "seed": seed,
    }


def _paths(paths: Pathish | Iterable[Pathish]) -> list[Pathish]:
    return [paths] if isinstance(paths, (str, PathLike)) else list(paths)


def download(path: Pathish, *, progress: ProgressCallback | None = None) -> Path:
    """The directory of a checkpoint. Where nothing of this name is here and it reads `org/name[@revision]`, it is downloaded from the hub into the cache
    that other tools share (`docs/hub.md`); a download that was stopped goes on where it was.

    Raises:
        HubError: The hub has no such checkpoint, or does not let you have it.
        IoError: It cannot be reached.
    """
    return Path(_llmpress.download(os.fspath(path), _teller(progress), _warn))


def inspect(path: Pathish, *, tensors: bool = False, entropy: bool = False, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """What is in a checkpoint: tensors, dtypes, encodings, sizes in bytes. `llmpress inspect --json`."""
    return _call(["inspect"], [path], {"tensors": tensors, "entropy": entropy}, progress)


def plan(
    path: Pathish,
    *,
    to: str | None = None,
    recipe: Pathish | None = None,
    base: Pathish | None = None,
    rules: dict[str, str] | Iterable[str] = (),
    max_shard_size: int | str | None = None,
    ranking: Iterable[Pathish] = (),
    portable: bool = False,
    pattern_file: Pathish | None = None,
    tied_embedding: bool = False,
    entropy_code: bool = False,
    target_bits: float | None = None,
    target_ratio: float | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    calib_windows: int | None = None,
    calib_window: int | None = None,
    jobs: int | None = None,
    max_memory: int | str | None = None,
    device: str | None = None,
    context: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """What a conversion would do, from headers alone: units, expected bytes, peak memory. `llmpress plan --json`; the options are those of
    :func:`convert`, which takes the result as its `plan`.

    Args:
        device: Also say what the model takes of a GPU's memory ("cuda"), with `context` tokens.
    """
    options = _recipe(to, recipe, base, rules, max_shard_size, ranking, portable, pattern_file, tied_embedding, entropy_code, target_bits, target_ratio, epochs, seed)
    options |= {"calib_windows": calib_windows, "calib_window": calib_window, "jobs": jobs, "max_memory": max_memory, "device": device, "context": context}
    return _call(["plan"], [path], options, progress)


def convert(
    path: Pathish,
    out: Pathish,
    *,
    to: str | None = None,
    recipe: Pathish | None = None,
    base: Pathish | None = None,
    rules: dict[str, str] | Iterable[str] = (),
    plan: Pathish | dict[str, Any] | None = None,
    max_shard_size: int | str | None = None,
    ranking: Iterable[Pathish] = (),
    portable: bool = False,
    pattern_file: Pathish | None = None,
    tied_embedding: bool = False,
    entropy_code: bool = False,
    target_bits: float | None = None,
    target_ratio: float | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    calib: Pathish | Iterable[Pathish] = (),
    calib_windows: int | None = None,
    calib_window: int | None = None,
    calib_seed: int | None = None,
    jobs: int | None = None,
    max_memory: int | str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint. `llmpress convert --json`.

    A lossless shard is decoded again and compared with the source before it gets its name. Ctrl-C, or an exception of `progress`, stops the job; what is
    finished stays, and `resume=True` goes on from there. Nothing at `out` is complete before `llmpress.json` is there.

    Args:
        path: The checkpoint: a directory, a GGUF file, or a name on the hub.
        out: The directory to make.
        to: The method or a chain, such as "dfloat11", "fixed12", "gptq:w4,g128", "drop:attn=8+dfloat11".
        recipe: A TOML file that says so instead.
        base: The checkpoint that this one was trained from: with `to="archive"` it is stored as its difference from it.
        rules: Exceptions by tensor name, `{REGULAR_EXPRESSION: METHOD}`.
        plan: What :func:`plan` gave, or a file that holds it.
        max_shard_size: Most source bytes in a shard, as a number or such as "5GB".
        calib: A text, or several, for what is calibrated.
        jobs: Worker threads; one per processor if not given. The result does not depend on it.
        max_memory: Most memory to use, in bytes or such as "2G".
        resume: Go on with an interrupted job.
        force: Replace what an earlier job made at `out`.
        progress: Is told, on the calling thread, how far the job is: before each part of it begins, then some times a second.

    The others are those of the command: `llmpress convert --help`.

    Returns:
        `out`, `source_bytes`, `output_bytes`, `ratio`, `seconds`, `gb_per_second`, `shards`, `resumed_shards`, `fallbacks` and more.
    """
    options = _recipe(to, recipe, base, rules, max_shard_size, ranking, portable, pattern_file, tied_embedding, entropy_code, target_bits, target_ratio, epochs, seed)
    options |= {
        "calib": _paths(calib),
        "calib_windows": calib_windows,
        "calib_window": calib_window,
        "calib_seed": calib_seed,
        "jobs": jobs,
        "max_memory": max_memory,
        "resume": resume,
        "force": force,
    }
    if not isinstance(plan, dict):
        return _call(["convert"], [path, out], options | {"plan": plan}, progress)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(plan, file)
        file.flush()
        return _call(["convert"], [path, out], options | {"plan": file.name}, progress)


def rank(
    path: Pathish,
    *,
    by: str,
    calib: Pathish | Iterable[Pathish] = (),
    calib_windows: int | None = None,
    calib_window: int | None = None,
    calib_seed: int | None = None,
    out: Pathish | None = None,
    resume: bool = False,
    svg: Pathish | None = None,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Ranks the sub-layers of a model for pruning, without converting. `llmpress rank --json`."""
    options = {
        "by": by,
        "calib": _paths(calib),
        "calib_windows": calib_windows,
        "calib_window": calib_window,
        "calib_seed": calib_seed,
        "out": out,
        "resume": resume,
        "svg": svg,
        "jobs": jobs,
    }
    return _call(["rank"], [path], options, progress)


def restore(
    path: Pathish,
    out: Pathish,
    *,
    base: Pathish | None = None,
    max_shard_size: int | str | None = None,
    jobs: int | None = None,
    max_memory: int | str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Turns a compressed checkpoint back into a plain one: byte for byte where nothing was lost. What is stored as its difference from another takes that
    one as `base`. `llmpress restore --json`."""
    options = {"base": base, "max_shard_size": max_shard_size, "jobs": jobs, "max_memory": max_memory, "resume": resume, "force": force}
    return _call(["restore"], [path, out], options, progress)


def export(
    path: Pathish,
    out: Pathish,
    *,
    as_: str,
    reports: Iterable[Pathish] = (),
    max_shard_size: int | str | None = None,
    jobs: int | None = None,
    max_memory: int | str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint in the format of other runtimes ("compressed-tensors", "gptq", "gguf", "safetensors"). `llmpress export --json`."""
    options = {
        "as_": as_,
        "report": _paths(reports),
        "max_shard_size": max_shard_size,
        "jobs": jobs,
        "max_memory": max_memory,
        "resume": resume,
        "force": force,
    }
    return _call(["export"], [path, out], options, progress)


def verify(
    path: Pathish,
    *,
    against: Pathish | None = None,
    base: Pathish | None = None,
    no_decode: bool = False,
    logits: bool = False,
    text: Pathish | None = None,
    window: int | None = None,
    limit: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
    weights: str | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Checks every digest of a converted checkpoint and decodes every tensor; with `against`, compares it with its source bit for bit (of quantised
    tensors, says how far they are). What is stored as its difference from another takes that one as `base`. `llmpress verify --json`.

    Raises:
        FindingsError: Something is not as it should be; its `report` is what would have been returned.
    """
    options = {
        "against": against,
        "base": base,
        "no_decode": no_decode,
        "logits": logits,
        "text": text,
        "window": window,
        "limit": limit,
        "jobs": jobs,
        "device": device,
        "weights": weights,
    }
    return _call(["verify"], [path], options, progress)


def diff(a: Pathish, b: Pathish, *, jobs: int | None = None, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """How far the tensors of two checkpoints are from each other: relative error, largest difference, cosine. `llmpress diff --json`.

    Checkpoints that differ are no failure here: see what is returned.
    """
    try:
        return _call(["diff"], [a, b], {"jobs": jobs}, progress)
    except FindingsError as found:
        return found.report
