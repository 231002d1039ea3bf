"""Checkpoints that tests share: the real one of the repository, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import llmpress

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tinylm() -> Path:
    return ROOT / "examples" / "tinylm"


@pytest.fixture(scope="session")
def converted(tinylm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory that a method makes of tinylm: each once for all tests, which must not change it."""
    made: dict[str, Path] = {}

    def make(to: str) -> Path:
        if to not in made:
            made[to] = tmp_path_factory.mktemp("converted") / "out"
            llmpress.convert(tinylm, made[to], to=to)
        return made[to]

    return make
