"""The load format "llmpress": a checkpoint's tensors under their own names, each decoded when a layer takes its part."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import huggingface_hub
import torch
from tqdm import tqdm
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import enable_tqdm
from vllm.platforms import current_platform

from .._checkpoint import Checkpoint, open
from .._directory import refuse_unfinished
from .._errors import InvalidError, UnsupportedError
from .stored import stored

#: What `--model-loader-extra-config` may have: those of vLLM's own loader that mean something here.
OPTIONS = {"num_threads", "enable_weights_track"}
#: Rows of two matrices that are compared at a time.
COMPARED_ROWS = 4096


class LlmpressModelLoader(DefaultModelLoader):
    """Loads any checkpoint that `llmpress.open` opens. It is vLLM's own loader but for where the tensors come from."""

    #: Whether the model's head is its embedding.
    _tied = False

    def __init__(self, load_config: LoadConfig) -> None:
        options = load_config.model_loader_extra_config
        unknown = set(options) - OPTIONS
        if unknown:
            raise InvalidError(f"model_loader_extra_config: the load format llmpress knows {', '.join(sorted(OPTIONS))}, not {', '.join(sorted(unknown))}")
        threads = options.get("num_threads")
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise InvalidError(f"model_loader_extra_config: num_threads: {threads!r} is no number of threads")
        super().__init__(load_config)

    def download_model(self, model_config: ModelConfig) -> None:
        self._directory(model_config.model, model_config.revision)

    def _directory(self, model: str, revision: str | None) -> Path:
        if os.path.exists(model):
            return Path(model)
        config = self.load_config
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                cache_dir=config.download_dir,
                ignore_patterns=config.ignore_patterns,
                local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
            )
        )

    def open(self, model: str, revision: str | None = None, subfolder: str | None = None) -> Checkpoint:
        """Opens a checkpoint, with threads that may use every processor of this worker."""
        directory = self._directory(model, revision) / (subfolder or "")
        processors = _processors()
        threads = self.load_config.model_loader_extra_config.get("num_threads")
        if threads is None and current_platform.is_cpu():
            # vLLM gave each worker as many as it has processors.
            threads = torch.get_num_threads()
        elif threads is None:
            # Workers share the processors.
            threads = max(1, len(processors) // get_tensor_model_parallel_world_size())
        with _on(processors):
            checkpoint = open(directory, threads=threads, stored=True)
        refuse_unfinished(checkpoint, "vLLM")
        return checkpoint

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        self._tied = getattr(model_config.hf_config, "tie_word_embeddings", False)
        super().load_weights(model, model_config)

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Generator[tuple[str, torch.Tensor], None, None]:
        self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
        checkpoint = self.open(source.model_or_path, source.revision, source.subfolder)
        if self._tied:
            _refuse_other_head(checkpoint)
        for name in tqdm(checkpoint, desc="Loading weights", disable=not enable_tqdm(self.load_config.use_tqdm_on_load)):
            if source.is_unused_weight is None or not source.is_unused_weight(name):
                yield source.prefix + name, stored(checkpoint, name)
        checkpoint.check_unchanged()


def _refuse_other_head(checkpoint: Checkpoint) -> None:
    """Refuses a head that the model would leave out. vLLM looks for one by the names that files have, where a compressed one has others."""
    head = next((name for name in checkpoint if name.endswith("lm_head.weight")), None)
    embedding = next((name for name in checkpoint if name.endswith("embed_tokens.weight")), None)
    if head is None or embedding is None:
        return
    rows = checkpoint[head].shape[0]
    same = checkpoint[head].shape == checkpoint[embedding].shape and all(
        torch.equal(*(checkpoint.torch(name, (at, min(at + COMPARED_ROWS, rows))) for name in (head, embedding)))
        for at in range(0, rows, COMPARED_ROWS)
    )
    if not same:
        raise UnsupportedError(
            f"{checkpoint.root}: config.json says that {head} is {embedding}, but it is another matrix: serve it with "
            """--hf-overrides '{"tie_word_embeddings": false}'"""
        )


def _processors() -> set[int]:
    """The processors that any thread of this process may use. OpenMP binds the threads that vLLM computes with to one each, this one too, and those
    that are begun from it would all share that one."""
    found = set(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                found |= os.sched_getaffinity(int(thread))
    return found


@contextlib.contextmanager
def _on(processors: set[int]) -> Iterator[None]:
    """Threads that are begun meanwhile may use these."""
    before = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, processors)
        yield
    finally:
        os.sched_setaffinity(0, before)
