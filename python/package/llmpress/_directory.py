"""What other libraries have to know of a checkpoint before they take its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ._checkpoint import Checkpoint
from ._errors import UnsupportedError


def is_compressed(root: Path, config: dict[str, Any]) -> bool:
    """Whether a directory, or a repository of the hub as far as its `config.json` tells, holds weights that llmpress has to decode."""
    try:
        manifest = json.loads((root / "llmpress.json").read_bytes())
    except (OSError, ValueError):
        return "dfloat11_config" in config
    units = manifest.get("units", {}).values() if isinstance(manifest, dict) else ()
    return any(unit.get("encoding", {}).get("name") != "raw" for unit in units)


def refuse_unfinished(checkpoint: Checkpoint, library: str) -> None:
    """Refuses what the modules of another library would compute wrongly."""
    online = [name for name in checkpoint.transforms if name.startswith("online: ")]
    if online:
        raise UnsupportedError(
            f"{checkpoint.root}: has the transformation {online[0].removeprefix('online: ')}, which {library} does not go on with: restore the checkpoint"
        )
    config = checkpoint.config or {}
    for key in ("drop_attn_list", "drop_mlp_list"):
        if any((config.get(key), config.get("text_config", {}).get(key))):
            raise UnsupportedError(f"{checkpoint.root}: sub-layers are gone ({key}), which {library} cannot leave out: convert with portable=True")
