"""The quantization method "llmpress": matrices and embeddings that stay compressed, on the processor.

    create_weights                 a weight on the meta device: it takes no memory
    its weight loader              vLLM's own; what it would copy is noted: which part of which tensor goes to which rows
    process_weights_after_loading  whole compressed matrices: kept, the weight becomes empty
                                   anything else: decoded into a weight, with which vLLM's own method goes on
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from .._errors import UnsupportedError
from .kept import Kept, Placed, embedding, keep, linear
from .stored import Stored, recording

#: The name of the method, and of the load format.
METHOD = "llmpress"


class LlmpressConfig(QuantizationConfig):
    """Has nothing to say: what is compressed, and how, is in the checkpoint."""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LlmpressConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not current_platform.is_cpu():
            raise UnsupportedError(
                "--quantization llmpress keeps weights compressed, which runs on the processor alone: leave it out, and weights are decoded when they "
                "are loaded"
            )
        if isinstance(layer, LinearBase):
            return LlmpressMethod(UnquantizedLinearMethod())
        if isinstance(layer, VocabParallelEmbedding):
            return LlmpressMethod(UnquantizedEmbeddingMethod())
        return None


class LlmpressMethod(LinearMethodBase):
    """The method of one layer: a linear, an embedding, or a head.

    Args:
        plain: vLLM's method for weights that are not quantised, for what cannot stay compressed.
    """

    def __init__(self, plain: UnquantizedLinearMethod | UnquantizedEmbeddingMethod) -> None:
        self.plain = plain
        #: Whether the layer's matrices stay compressed.
        self.kept = False
        #: Whether an embedding is the head, too.
        self.tied = False
        #: What is noted; `None` as soon as the weight has memory.
        self.placed: list[Placed] | None = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        loader = extra_weight_attrs.pop("weight_loader")
        self.attributes = {
            "input_dim": 1,
            "output_dim": 0,
            "weight_loader": functools.partial(self._load, layer, loader),
            **extra_weight_attrs,
        }
        shape = (sum(output_partition_sizes), input_size_per_partition)
        self._set_weight(layer, torch.empty(shape, dtype=params_dtype, device="meta"))

    def _set_weight(self, layer: Any, data: torch.Tensor) -> None:
        weight = Parameter(data, requires_grad=False)
        set_weight_attrs(weight, dict(self.attributes))
        layer.register_parameter("weight", weight)

    def _load(self, layer: Any, loader: Any, param: Parameter, loaded_weight: torch.Tensor, *shard: Any, **named: Any) -> None:
        if self.kept:
            raise UnsupportedError("weights that stay compressed cannot be loaded again: start anew")
        if self.placed is not None and isinstance(loaded_weight, Stored):
            with recording(self._place):
                loader(layer.weight, loaded_weight, *shard, **named)
        else:
            # A model that changed the numbers before it gave them.
            self._decode(layer)
            loader(layer.weight, loaded_weight, *shard, **named)

    def _place(self, out: torch.Tensor, source: Stored) -> None:
        assert self.placed is not None
        width, offset = out.stride(0), int(out.storage_offset())
        if out.dim() != 2 or out.shape[1] != width or offset % width:
            part = source.part
            raise UnsupportedError(f"{part.checkpoint.root}: {part.name}: goes to some columns of a weight: leave --quantization llmpress out")
        placed = Placed(offset // width, source.part)
        before = self.placed[-1] if self.placed else None
        # What is fused in the checkpoint comes in parts, one after the other.
        joined = before and before.followed_by(placed)
        if joined:
            self.placed[-1] = joined
        else:
            self.placed.append(placed)

    def _decode(self, layer: Any) -> None:
        """Gives the weight memory and decodes what was noted into it. Rows that nothing was loaded for, an embedding's padding, are zero."""
        if self.placed is None:
            return
        weight = torch.zeros(layer.weight.shape, dtype=layer.weight.dtype, device="cpu")
        for placed in self.placed:
            placed.part.copy_to(weight[placed.row : placed.end])
        self.placed = None
        self._set_weight(layer, weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.kept:
            return
        gathers = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
        multiplies = not gathers or self.tied
        if not self._can_keep(layer, multiplies):
            self._decode(layer)
            self.plain.process_weights_after_loading(layer)
            return
        assert self.placed is not None
        layer.llmpress_rows = layer.weight.shape[0]
        layer.register_buffer("llmpress_handle", keep(layer, Kept(self.placed, layer.llmpress_rows, multiplies=multiplies)), persistent=False)
        self._set_weight(layer, torch.empty(0, dtype=layer.weight.dtype, device="cpu"))
        self.kept = True

    def _can_keep(self, layer: Any, multiplies: bool) -> bool:
        """Whether all that the layer holds is compressed, with whole rows for an embedding, and whole matrices for products."""
        if not self.placed:
            return False
        rows, columns = layer.weight.shape
        filled = 0
        for placed in sorted(self.placed, key=lambda each: each.row):
            part = placed.part
            info = part.checkpoint[part.name]
            if info.encoding == "raw" or info.shape[1:] != (columns,) or part.columns != (0, columns) or placed.row != filled:
                return False
            if multiplies and not part.is_whole:
                return False
            filled = placed.end
        # An embedding is one tensor, and may have padding after it.
        return len(self.placed) == 1 if isinstance(layer, VocabParallelEmbedding) else filled == rows

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.kept:
            return self.plain.apply(layer, x, bias)
        out = linear(x, layer.llmpress_handle, layer.llmpress_rows)
        return out if bias is None else out + bias

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        if not self.kept:
            return self.plain.embedding(layer, input_)
        return embedding(input_, layer.llmpress_handle, layer.embedding_dim, layer.params_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> torch.nn.Module:
        # The embedding becomes the head: both have the same compressed bytes.
        embed_tokens.quant_method.tied = True
        return embed_tokens
