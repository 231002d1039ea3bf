"""Embeddings and heads: `layers/vocab_parallel_embedding.py` of vLLM. A rank holds some tokens; the vocabulary is padded to a multiple of 64 before."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter, functional

from .linear import divide
from .quantization import QuantizationConfig, QuantizeMethodBase, set_weight_attrs


def get_tensor_model_parallel_rank() -> int:
    return 0


def get_tensor_model_parallel_world_size() -> int:
    return 1


class UnquantizedEmbeddingMethod(QuantizeMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra_weight_attrs
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        weight = Parameter(data, requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer, input_):
        return functional.embedding(input_, layer.weight)


class VocabParallelEmbedding(torch.nn.Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = 64,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        assert org_num_embeddings in (None, num_embeddings), "added vocabularies are left out"
        rank, self.tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.org_vocab_size, self.embedding_dim = num_embeddings, embedding_dim
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.num_embeddings_padded = -(-num_embeddings // padding_size) * padding_size
        self.num_embeddings_per_partition = divide(self.num_embeddings_padded, self.tp_size)
        self.first = min(rank * self.num_embeddings_per_partition, num_embeddings)
        self.end = min(self.first + self.num_embeddings_per_partition, num_embeddings)
        method = quant_config.get_quant_method(self, prefix) if quant_config is not None else None
        self.quant_method: QuantizeMethodBase = method or UnquantizedEmbeddingMethod()
        implemented = type(self.quant_method).embedding is not QuantizeMethodBase.embedding
        if not implemented and not isinstance(self, ParallelLMHead):
            raise NotImplementedError(f"{type(self.quant_method).__name__} has no embedding")
        self.quant_method.create_weights(
            self,
            embedding_dim,
            [self.num_embeddings_per_partition],
            embedding_dim,
            self.num_embeddings_padded,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param: Parameter, loaded_weight: torch.Tensor) -> None:
        dim = param.output_dim
        assert loaded_weight.shape[dim] == self.org_vocab_size
        loaded_weight = loaded_weight.narrow(dim, self.first, self.end - self.first)
        param[: loaded_weight.shape[0]].data.copy_(loaded_weight)
        param[loaded_weight.shape[0] :].data.fill_(0)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return self.quant_method.embedding(self, input_.long())
        # Zero where another rank has the token: the ranks' outputs would be added up.
        here = (input_ >= self.first) & (input_ < self.end)
        output = self.quant_method.embedding(self, (here * (input_ - self.first)).long())
        return output.masked_fill_(~here.unsqueeze(-1), 0)


class ParallelLMHead(VocabParallelEmbedding):
    def __init__(self, num_embeddings: int, embedding_dim: int, bias: bool = False, *args: Any, **kwargs: Any) -> None:
        assert not bias, "heads with a bias are left out"
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.register_parameter("bias", None)

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> torch.nn.Module:
        return self.quant_method.tie_weights(self, embed_tokens)
