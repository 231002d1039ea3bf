"""Methods, their configurations, and how these are registered: `layers/quantization`, `platforms`, `model_executor/utils` of vLLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch


class _Processor:
    @staticmethod
    def is_cpu() -> bool:
        return True


current_platform = _Processor()


def set_weight_attrs(weight: torch.Tensor, weight_attrs: dict[str, Any] | None) -> None:
    for name, value in (weight_attrs or {}).items():
        assert not hasattr(weight, name), name
        setattr(weight, name, value)


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def embedding(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        return


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None) -> str | None:
        return None

    @abstractmethod
    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None: ...


_registered: dict[str, type[QuantizationConfig]] = {}


def register_quantization_config(quantization: str) -> Any:
    def register(config: type[QuantizationConfig]) -> type[QuantizationConfig]:
        if not issubclass(config, QuantizationConfig):
            raise ValueError(f"{config} is no QuantizationConfig")
        _registered[quantization] = config
        return config

    return register


def get_quantization_config(quantization: str) -> type[QuantizationConfig]:
    if quantization not in _registered:
        raise ValueError(f"no quantization method {quantization}")
    return _registered[quantization]
