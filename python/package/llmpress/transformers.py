"""Models of transformers that run from compressed weights.

    import llmpress.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("OUT")

Importing it registers a quantizer of the name "llmpress", and has transformers ask for it wherever a directory holds weights that llmpress compressed:
one with `llmpress.json`, or an official DFloat11 directory. No file of the directory has to say so, and none is changed.

    matrix, embedding, compressed --> Linear, Embedding of this module: the weights stay as they are stored
    everything else               --> decoded by llmpress, then loaded by transformers under its own names
"""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._checkpoint import Checkpoint, open
from ._directory import is_compressed, refuse_unfinished
from ._errors import InvalidError, UnsupportedError
from ._llmpress import Linear as Product

__all__ = ["Embedding", "Linear", "LlmpressConfig", "LlmpressQuantizer"]

#: The name of the quantizer.
METHOD = "llmpress"
#: How products are made.
PRODUCTS = ("kernels", "torch")


@auto.register_quantization_config(METHOD)
class LlmpressConfig(QuantizationConfigMixin):
    """How compressed weights are used.

    Args:
        products: "kernels" multiplies from the compressed form, in float32, on the processor, and rounds to the dtype of the inputs; "torch" decodes a
            matrix for every product and has torch multiply, in the dtype of the inputs: bit for bit what the restored checkpoint gives.
        threads: Threads that decode and multiply; as many as torch uses if not given.
    """

    def __init__(self, products: str = "kernels", threads: int | None = None, **_: Any) -> None:
        if products not in PRODUCTS:
            raise InvalidError(f"products: {products!r} is none of {', '.join(PRODUCTS)}")
        self.quant_method = METHOD
        self.products = products
        self.threads = threads

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained(..., quantization_config=LlmpressConfig(...))` may say of a directory that is compressed already."""
        return {"products": self.products, "threads": self.threads}


# Without it transformers takes what the directory says, which is nothing, over what the caller does.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, LlmpressConfig)


class _Multiply(torch.autograd.Function):
    """`x W^T` by the kernels of llmpress: float32 `[tokens, in_features]` to `[tokens, out_features]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: Product) -> torch.Tensor:
        out = x.new_empty(x.shape[0], product.out_features)
        product.multiply(x.detach(), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError('compressed weights have no derivatives here: load with LlmpressConfig(products="torch"), or restore the checkpoint')


class _Compressed(nn.Module):
    """A matrix that stays as it is stored."""

    def __init__(self, checkpoint: Checkpoint, tensor: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.tensor = tensor
        self.dtype = dtype
        # Nothing of it is to be initialised.
        self._is_hf_initialized = True

    @property
    def weight(self) -> torch.Tensor:
        """The decoded matrix, made anew each time: `[rows, columns]` in the model's dtype."""
        return self.checkpoint.torch(self.tensor).to(self.dtype)

    def _check(self, x: torch.Tensor) -> None:
        if x.device.type != "cpu":
            raise UnsupportedError(
                f"{self.checkpoint.root}: {self.tensor}: compressed weights run on the processor here, not on {x.device}: restore the checkpoint, or use "
                "`llmpress generate --device cuda`"
            )

    def extra_repr(self) -> str:
        info = self.checkpoint[self.tensor]
        return f"{info.shape}, {info.encoding}{f' {info.widths}' if info.widths else ''}"


class Linear(_Compressed):
    """`y = x W^T + b`, where W `[out_features, in_features]` is compressed. `x` is `[..., in_features]` of any float dtype."""

    def __init__(self, checkpoint: Checkpoint, tensor: str, dtype: torch.dtype, bias: nn.Parameter | None, products: str) -> None:
        super().__init__(checkpoint, tensor, dtype)
        self.out_features, self.in_features = checkpoint[tensor].shape
        self.products = products
        self.product = checkpoint.linear(tensor) if products == "kernels" else None
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x)
        if self.product is None:
            return functional.linear(x, self.weight.to(x.dtype), self.bias)
        flat = x.reshape(-1, self.in_features).to(torch.float32).contiguous()
        out = _Multiply.apply(flat, self.product).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class Embedding(_Compressed):
    """Rows of a compressed matrix `[num_embeddings, embedding_dim]`, decoded when they are asked for: `[...]` integers to `[..., embedding_dim]`."""

    def __init__(self, checkpoint: Checkpoint, tensor: str, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, tensor, dtype)
        self.num_embeddings, self.embedding_dim = checkpoint[tensor].shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self._check(ids)
        rows = self.checkpoint.gather(self.tensor, ids.reshape(-1).tolist()).torch()
        return rows.to(self.dtype).reshape(*ids.shape, self.embedding_dim)


class _Stored:
    """A tensor that is decoded when it is sliced, as transformers takes those of safetensors."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def get_dtype(self) -> str:
        return self._checkpoint[self._name].dtype

    def get_shape(self) -> list[int]:
        return list(self._checkpoint[self._name].shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.torch(self._name)[index]


@auto.register_quantizer(METHOD)
class LlmpressQuantizer(HfQuantizer):
    """Puts compressed modules where a checkpoint holds compressed matrices, and gives transformers everything else decoded."""

    requires_calibration = True
    checkpoint: Checkpoint | None = None
    #: Tensors of the checkpoint that modules hold.
    held: set[str] = set()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            if place is not None and str(place) not in ("cpu", "auto"):
                raise UnsupportedError(
                    f"compressed weights run on the processor here, not on {place}: leave device_map out, restore the checkpoint, or use "
                    "`llmpress generate --device cuda`"
                )

    def update_device_map(self, device_map: Any) -> Any:
        # "auto" would take a GPU where there is one.
        return {"": "cpu"} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise InvalidError("compressed weights are loaded from a directory: give from_pretrained its path")
        config = self.quantization_config
        checkpoint = open(Path(checkpoint_files[0]).parent, threads=config.threads or torch.get_num_threads())
        refuse_unfinished(checkpoint, "transformers")
        self.checkpoint, self.held = checkpoint, set()
        dtype = dtype or torch.get_default_dtype()
        for parameter, tensor in _places(model, checkpoint, self).items():
            path = parameter.removesuffix(".weight")
            parent, _, child = path.rpartition(".")
            module = model.get_submodule(path)
            if isinstance(module, nn.Embedding):
                new: nn.Module = Embedding(checkpoint, tensor, dtype)
            else:
                new = Linear(checkpoint, tensor, dtype, module.bias, config.products)
            setattr(model.get_submodule(parent), child, new)
            self.held.add(tensor)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.save_pretrained = types.MethodType(_save_pretrained, model)
        return model

    def state_dict(self) -> dict[str, Any]:
        """The tensors that no compressed module holds, decoded when they are sliced."""
        checkpoint = self.checkpoint
        assert checkpoint is not None
        return {name: _Stored(checkpoint, name) for name in checkpoint if name not in self.held}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if not isinstance(module, _Compressed):
                continue
            weight = module.weight.to(dtype)
            with torch.device("meta"):
                if isinstance(module, Embedding):
                    new: nn.Module = nn.Embedding(module.num_embeddings, module.embedding_dim)
                else:
                    new = nn.Linear(module.in_features, module.out_features, bias=False)
                    new.bias = module.bias
            new.weight = nn.Parameter(weight.clone(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        model.__dict__.pop("save_pretrained", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _places(model: PreTrainedModel, checkpoint: Checkpoint, quantizer: HfQuantizer) -> dict[str, str]:
    """The parameters whose modules become compressed ones, and the tensors of the checkpoint that these hold."""
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known = model.state_dict()
    places = {}
    for name, info in checkpoint.items():
        if info.encoding == "raw":
            continue
        parameter, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if merged is None and parameter in known and _suits(model, parameter, info.shape):
            places[parameter] = name
    # What shares its weights with another one holds the same tensor, or neither is compressed.
    for target, source in dict(model.all_tied_weights_keys).items():
        name = places.get(source) or places.get(target)
        if name is None:
            continue
        if all(_suits(model, each, checkpoint[name].shape) for each in (target, source)):
            places[target] = places[source] = name
            del model.all_tied_weights_keys[target]
        else:
            places.pop(target, None)
            places.pop(source, None)
    return places


def _suits(model: PreTrainedModel, parameter: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the matrix of a module that is exactly a Linear or an Embedding: others may do more with it."""
    path, _, last = parameter.rpartition(".")
    if last != "weight" or not path:
        return False
    module = model.get_submodule(path)
    return type(module) in (nn.Linear, nn.Embedding) and tuple(module.weight.shape) == shape


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *_: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
    """Copies the directory that the model was loaded from, as it is."""
    if push_to_hub:
        raise UnsupportedError("push_to_hub: upload the directory itself, for example by huggingface_hub.upload_folder")
    if kwargs.get("state_dict") is not None:
        raise UnsupportedError("state_dict: a compressed checkpoint is saved as it is; restore it to change its weights")
    root, out = model.hf_quantizer.checkpoint.root, Path(save_directory)
    if out.exists() and out.samefile(root):
        return
    for path in _files(root):
        target = out / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        # Files and folders whose names begin so are the system's, git's or an unfinished job's.
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


_get_config_dict = PreTrainedConfig.get_config_dict.__func__
_load_pretrained_model = PreTrainedModel._load_pretrained_model


def _config_dict_with_method(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    """Says of a directory with compressed weights, when its configuration is read, which quantizer it needs."""
    config, rest = _get_config_dict(cls, pretrained_model_name_or_path, **kwargs)
    if isinstance(config, dict) and not kwargs.get("gguf_file"):
        root = Path(os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if is_compressed(root, config):
            config["quantization_config"] = {"quant_method": METHOD}
    return config, rest


def _load_by_reader(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the tensors from our reader where our quantizer is at work: those in the files are the encodings'."""
    if isinstance(load_config.hf_quantizer, LlmpressQuantizer):
        state_dict = load_config.hf_quantizer.state_dict()
    return _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


PreTrainedConfig.get_config_dict = classmethod(_config_dict_with_method)
PreTrainedModel._load_pretrained_model = staticmethod(_load_by_reader)
