"""A plug-in for vLLM: serves checkpoints that llmpress compressed.

    vllm serve OUT                          weights are decoded when they are loaded, each rank's own part, and lie in memory as those of any model
    vllm serve OUT --quantization llmpress  on vLLM's processor backend: matrices and embeddings stay compressed

vLLM finds it by its entry point, `vllm.general_plugins`: nothing has to be imported.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from .._directory import is_compressed
from .._errors import InvalidError

__all__ = ["register"]


def register() -> None:
    """What vLLM calls in each of its processes. It may be called again."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from .loader import LlmpressModelLoader
    from .quantization import METHOD, LlmpressConfig

    original = EngineArgs.create_model_config
    if getattr(original, "chooses_llmpress", False):
        return
    register_quantization_config(METHOD)(LlmpressConfig)
    register_model_loader(METHOD)(LlmpressModelLoader)

    @functools.wraps(original)
    def create_model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Chooses the load format where the user left it to vLLM."""
        if self.load_format == "auto" and (self.quantization == METHOD or _needs_loader(Path(self.model))):
            self.load_format = METHOD
        if self.quantization == METHOD and self.load_format != METHOD:
            raise InvalidError(f"--quantization {METHOD} needs --load-format {METHOD}, not {self.load_format}")
        return original(self, *args, **kwargs)

    create_model_config.chooses_llmpress = True  # type: ignore[attr-defined]
    EngineArgs.create_model_config = create_model_config


def _needs_loader(root: Path) -> bool:
    """Whether it is a directory that vLLM's own loaders would not understand."""
    try:
        config = json.loads((root / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and is_compressed(root, config)
