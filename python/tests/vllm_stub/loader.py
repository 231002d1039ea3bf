"""What is asked for, and who loads it: `engine/arg_utils`, `config` and `model_loader` of vLLM."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any

import torch


@dataclasses.dataclass
class ModelConfig:
    model: str
    revision: str | None = None
    quantization: str | None = None
    hf_config: Any = None


@dataclasses.dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None
    model_loader_extra_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignore_patterns: list[str] = dataclasses.field(default_factory=lambda: ["original/**/*"])
    use_tqdm_on_load: bool = True


@dataclasses.dataclass
class EngineArgs:
    """The engine makes the configuration of the model first, then that of loading."""

    model: str
    quantization: str | None = None
    load_format: str = "auto"
    revision: str | None = None

    def create_model_config(self) -> ModelConfig:
        return ModelConfig(self.model, self.revision, self.quantization)

    def create_load_config(self) -> LoadConfig:
        return LoadConfig(self.load_format)


class BaseModelLoader(ABC):
    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: ModelConfig) -> None: ...

    @abstractmethod
    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None: ...


class DefaultModelLoader(BaseModelLoader):
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None
        subfolder: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list[str] | None = None
        is_unused_weight: Callable[[str], bool] | None = None

    counter_before_loading_weights: float = 0.0

    def download_model(self, model_config: ModelConfig) -> None:
        raise NotImplementedError

    def _get_weights_iterator(self, source: Source) -> Generator[tuple[str, torch.Tensor], None, None]:
        raise NotImplementedError

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        source = self.Source(model_config.model, model_config.revision)
        loaded = model.load_weights(self._get_weights_iterator(source))
        if model_config.quantization is None and loaded is not None:
            missing = {name for name, _ in model.named_parameters()} - loaded
            if missing:
                raise ValueError(f"weights that were not loaded: {sorted(missing)}")


def enable_tqdm(use_tqdm_on_load: bool) -> bool:
    return use_tqdm_on_load


_loaders: dict[str, type[BaseModelLoader]] = {"auto": DefaultModelLoader}


def register_model_loader(load_format: str) -> Any:
    def register(loader: type[BaseModelLoader]) -> type[BaseModelLoader]:
        if not issubclass(loader, BaseModelLoader):
            raise ValueError(f"{loader} is no BaseModelLoader")
        _loaders[load_format] = loader
        return loader

    return register


def get_model_loader(load_config: LoadConfig) -> BaseModelLoader:
    if load_config.load_format not in _loaders:
        raise ValueError(f"no load format {load_config.load_format}")
    return _loaders[load_config.load_format](load_config)
