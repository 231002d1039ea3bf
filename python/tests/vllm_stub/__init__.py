"""The classes of vLLM 0.33.0 that the plug-in touches, for tests where vLLM is not installed: what they are called, what they take, and what they do in
which order. `install` makes them importable as `vllm`. Where vLLM is installed the same tests run on it instead.

    linear.py      LinearMethodBase, UnquantizedLinearMethod; Replicated-, Column-, MergedColumn-, QKV- and RowParallelLinear with `weight_loader`
    embedding.py   VocabParallelEmbedding and ParallelLMHead with padded shards, UnquantizedEmbeddingMethod
    quantization.py  QuantizationConfig, QuantizeMethodBase, and how a configuration is registered
    loader.py      EngineArgs, ModelConfig, LoadConfig, DefaultModelLoader, and how a loader is registered

Left out: attention, models and the engine; collectives (a rank's output is its own part); packed, block-scaled and scalar parameters and
`weight_loader_v2`, which vLLM uses for a list of methods of its own; added vocabularies (LoRA); files that are split by vLLM, experts, online quantization.
"""

from __future__ import annotations

import sys
import types


def install() -> None:
    """Puts the modules where `import vllm` finds them."""
    from . import embedding, linear, loader, quantization

    def module(name: str, **members: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        return made

    for name, made in {
        "vllm.config": loader,
        "vllm.config.load": loader,
        "vllm.distributed": module("vllm.distributed", get_tensor_model_parallel_world_size=lambda: 1),
        "vllm.engine.arg_utils": loader,
        "vllm.model_executor.layers.linear": linear,
        "vllm.model_executor.layers.quantization": quantization,
        "vllm.model_executor.layers.quantization.base_config": quantization,
        "vllm.model_executor.layers.vocab_parallel_embedding": embedding,
        "vllm.model_executor.model_loader": loader,
        "vllm.model_executor.model_loader.default_loader": loader,
        "vllm.model_executor.model_loader.weight_utils": loader,
        "vllm.model_executor.utils": quantization,
        "vllm.platforms": quantization,
    }.items():
        sys.modules[name] = made
        # Packages on the way, and what they have as attributes.
        while "." in name:
            name, _, last = name.rpartition(".")
            package = sys.modules.setdefault(name, module(name, __path__=[]))
            setattr(package, last, sys.modules[f"{name}.{last}"])
