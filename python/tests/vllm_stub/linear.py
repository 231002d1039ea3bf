"""Parallel linears: `layers/linear.py` of vLLM. A rank holds some outputs (column) or some inputs (row) of the matrix of the checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch.nn import Parameter, functional

from .quantization import QuantizationConfig, QuantizeMethodBase, set_weight_attrs


def get_tensor_model_parallel_rank() -> int:
    return 0


def get_tensor_model_parallel_world_size() -> int:
    return 1


def divide(numerator: int, denominator: int) -> int:
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"
    return numerator // denominator


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None: ...

    @abstractmethod
    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra_weight_attrs
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        weight = Parameter(data, requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return functional.linear(x, layer.weight, bias)


class LinearBase(torch.nn.Module):
    """Decides the method, has it create the weight with this layer's loader, and adds the bias, whose loader is the same."""

    #: The dimension of the weight that ranks share out; none where each has all of it.
    shared_out: int | None = None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        disable_tp: bool = False,
        output_sizes: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.tp_rank = 0 if disable_tp else get_tensor_model_parallel_rank()
        self.tp_size = 1 if disable_tp else get_tensor_model_parallel_world_size()
        self.input_size, self.output_size = input_size, output_size
        self.skip_bias_add = skip_bias_add
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.quant_config, self.prefix = quant_config, prefix
        by_outputs, by_inputs = self.shared_out == 0, self.shared_out == 1
        self.input_size_per_partition = divide(input_size, self.tp_size) if by_inputs else input_size
        parts = output_sizes or [output_size]
        self.output_partition_sizes = [divide(size, self.tp_size) if by_outputs else size for size in parts]
        self.output_size_per_partition = sum(self.output_partition_sizes)
        self.quant_method: QuantizeMethodBase = UnquantizedLinearMethod()
        if quant_config is not None:
            method = quant_config.get_quant_method(self, prefix)
            if method is None:
                raise ValueError("all linear layers have a method")
            self.quant_method = method
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=self.input_size_per_partition,
            output_partition_sizes=self.output_partition_sizes,
            input_size=input_size,
            output_size=output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )
        if bias:
            self.bias = Parameter(torch.empty(self.output_size_per_partition, dtype=self.params_dtype), requires_grad=False)
            set_weight_attrs(self.bias, {"output_dim": 0, "weight_loader": self.weight_loader})
        else:
            self.register_parameter("bias", None)

    def weight_loader(self, param: Parameter, loaded_weight: torch.Tensor, *shard: Any) -> None:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Parameter | None]:
        # The rows' partial sums would be added up over the ranks; the first one's have the bias.
        bias = None if self.skip_bias_add or (self.shared_out == 1 and self.tp_rank > 0) else self.bias
        return self.quant_method.apply(self, x, bias), self.bias if self.skip_bias_add else None


def _fill(param_data: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    assert param_data.shape == loaded_weight.shape, f"{tuple(loaded_weight.shape)} into {tuple(param_data.shape)}"
    param_data.copy_(loaded_weight)


class ReplicatedLinear(LinearBase):
    def weight_loader(self, param: Parameter, loaded_weight: torch.Tensor) -> None:
        _fill(param.data, loaded_weight)


class ColumnParallelLinear(LinearBase):
    shared_out = 0

    def weight_loader(self, param: Parameter, loaded_weight: torch.Tensor) -> None:
        size = param.data.shape[param.output_dim]
        _fill(param.data, loaded_weight.narrow(param.output_dim, self.tp_rank * size, size))


class RowParallelLinear(LinearBase):
    shared_out = 1

    def weight_loader(self, param: Parameter, loaded_weight: torch.Tensor) -> None:
        dim = getattr(param, "input_dim", None)
        if dim is not None:
            size = param.data.shape[dim]
            loaded_weight = loaded_weight.narrow(dim, self.tp_rank * size, size)
        _fill(param.data, loaded_weight)


class _Fused(ColumnParallelLinear):
    """Several matrices, one after the other in each rank's weight, loaded one at a time by the number or letter of theirs, or at once."""

    #: What a part is called, how many outputs it has in the checkpoint, and on how many ranks in a row each of its parts lies.
    parts: dict[Any, tuple[int, int]]

    def weight_loader(self, param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
        dim = param.output_dim
        if loaded_shard_id is None:
            at = 0
            for each, (size, _) in self.parts.items():
                self.weight_loader(param, loaded_weight.narrow(dim, at, size), each)
                at += size
            return
        place = list(self.parts).index(loaded_shard_id)
        offset, size = sum(self.output_partition_sizes[:place]), self.output_partition_sizes[place]
        start = self.tp_rank // self.parts[loaded_shard_id][1] * size
        _fill(param.data.narrow(dim, offset, size), loaded_weight.narrow(dim, start, size))


class MergedColumnParallelLinear(_Fused):
    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = True, **options: Any) -> None:
        self.__dict__["parts"] = {i: (size, 1) for i, size in enumerate(output_sizes)}
        self.__dict__["output_sizes"] = output_sizes
        super().__init__(input_size, sum(output_sizes), bias, output_sizes=output_sizes, **options)


class QKVParallelLinear(_Fused):
    def __init__(
        self, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int | None = None, bias: bool = True, **options: Any
    ) -> None:
        ranks = 1 if options.get("disable_tp") else get_tensor_model_parallel_world_size()
        kv_heads = total_num_kv_heads or total_num_heads
        # With fewer of these heads than ranks, each lies on several ranks.
        replicas = divide(ranks, kv_heads) if ranks >= kv_heads else 1
        kv = kv_heads * head_size
        self.__dict__["parts"] = {"q": (total_num_heads * head_size, 1), "k": (kv, replicas), "v": (kv, replicas)}
        sizes = [total_num_heads * head_size, kv * replicas, kv * replicas]
        super().__init__(hidden_size, sum(sizes), bias, output_sizes=sizes, **options)
