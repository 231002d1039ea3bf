"""The plug-in gives each rank of vLLM its own part of a checkpoint, bit for bit, and computes from compressed weights what the plain ones give.

Runs on vLLM where it is installed, else on the stand-in of `vllm_stub`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import llmpress
from conftest import ROOT

if importlib.util.find_spec("vllm") is None:
    import vllm_stub

    vllm_stub.install()
    REAL = False
else:
    REAL = True

import llmpress.vllm
from llmpress.vllm import loader as ours
from llmpress.vllm.quantization import LlmpressConfig, LlmpressMethod
from llmpress.vllm.stored import Part, Stored, stored
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear as linears
from vllm.model_executor.layers import vocab_parallel_embedding as embeddings
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader import get_model_loader

llmpress.vllm.register()

#: Matrices that are stored as the sources were, without loss, and with: what is decoded is what `restore` gives.
ENCODINGS = ["dfloat11", "fixed12", "planes", "rtn:w4,g64", "sparse24:magnitude", "sparse24:magnitude+fixed12", "rtn:w3a8"]
BLOCK = "model.layers.1."
HEADS, KV_HEADS, HEAD = 4, 2, 64
HIDDEN, INNER, VOCABULARY = 256, 768, 4096


@pytest.fixture(scope="session")
def restored(converted, tmp_path_factory):
    made = {}

    def make(to):
        if to not in made:
            out = tmp_path_factory.mktemp("restored") / "out"
            llmpress.restore(converted(to), out)
            made[to] = llmpress.open(out)
        return made[to]

    return make


@pytest.fixture(autouse=True)
def engine():
    """What vLLM sets up around the construction of a model."""
    if not REAL:
        yield
        return
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(autouse=True)
def on_rank(monkeypatch):
    """Makes layers that are built from now on those of a rank, with its own part as output; at first of the only one."""
    modules = [linears, embeddings, ours]
    if REAL:
        modules.append(importlib.import_module("vllm.model_executor.parameter"))

    def be(rank, ranks):
        for module in modules:
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank, raising=False)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks, raising=False)

    monkeypatch.setattr(embeddings, "tensor_model_parallel_all_reduce", lambda part: part, raising=False)
    be(0, 1)
    return be


def weights(directory, **options):
    """The names and tensors that vLLM's models are given."""
    loader = get_model_loader(LoadConfig(load_format="llmpress", use_tqdm_on_load=False, **options))
    return dict(loader._get_weights_iterator(loader.Source(str(directory), None)))


def model_config(directory, tied=True):
    """What a loader is told of the model."""
    return SimpleNamespace(
        model=str(directory), revision=None, quantization=None, hf_config=SimpleNamespace(tie_word_embeddings=tied), is_moe=False, multimodal_config=None
    )


class Block(torch.nn.Module):
    """A layer of each kind, with the weights of one block, as vLLM's model of this family builds and fills it."""

    PLACES = {
        "self_attn.q_proj": ("qkv", "q"),
        "self_attn.k_proj": ("qkv", "k"),
        "self_attn.v_proj": ("qkv", "v"),
        "self_attn.o_proj": ("row", None),
        "mlp.gate_proj": ("merged", 0),
        "mlp.up_proj": ("merged", 1),
    }

    def __init__(self, dtype=torch.bfloat16, config=None):
        super().__init__()
        options = {"bias": False, "params_dtype": dtype, "quant_config": config}
        self.qkv = linears.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="qkv", **options)
        self.row = linears.RowParallelLinear(HIDDEN, HIDDEN, prefix="row", **options)
        self.merged = linears.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], prefix="merged", **options)
        self.column = linears.ColumnParallelLinear(HIDDEN, INNER, prefix="column", **options)
        self.replicated = linears.ReplicatedLinear(INNER, HIDDEN, prefix="replicated", **options)

    def load_weights(self, tensors):
        tensors = dict(tensors)
        for name, (layer, shard) in self.PLACES.items():
            weight = getattr(self, layer).weight
            weight.weight_loader(weight, tensors[f"{BLOCK}{name}.weight"], *([] if shard is None else [shard]))
        for layer, name in (("column", "mlp.up_proj"), ("replicated", "mlp.down_proj")):
            weight = getattr(self, layer).weight
            weight.weight_loader(weight, tensors[f"{BLOCK}{name}.weight"])
        return {name for name, _ in self.named_parameters()}

    def expected(self, plain, rank, ranks):
        """The weight of each layer on a rank, cut from a plain checkpoint."""

        def tensor(name):
            return plain.torch(f"{BLOCK}{name}.weight")

        def share(tensor, dim=0, index=rank, of=ranks):
            return tensor.chunk(of, dim)[index]

        kv = min(ranks, KV_HEADS)
        heads = [share(tensor(f"self_attn.{each}_proj"), index=rank * kv // ranks, of=kv) for each in "kv"]
        return {
            "qkv": torch.cat([share(tensor("self_attn.q_proj")), *heads]),
            "row": share(tensor("self_attn.o_proj"), 1),
            "merged": torch.cat([share(tensor("mlp.gate_proj")), share(tensor("mlp.up_proj"))]),
            "column": share(tensor("mlp.up_proj")),
            "replicated": tensor("mlp.down_proj"),
        }

    def finish(self):
        for layer in self.children():
            layer.quant_method.process_weights_after_loading(layer)


def product(layer, x):
    out = layer.quant_method.apply(layer, x, None)
    return out[0] if isinstance(out, tuple) else out


RANKS = [(rank, ranks) for ranks in (1, 2, 4) for rank in range(ranks)]


@pytest.mark.parametrize("to", ENCODINGS)
@pytest.mark.parametrize("rank, ranks", RANKS)
def test_each_rank_has_its_slices_of_the_plain_checkpoint(to, rank, ranks, converted, restored, on_rank):
    on_rank(rank, ranks)
    block = Block()
    block.load_weights(weights(converted(to)).items())
    for name, expected in block.expected(restored(to), rank, ranks).items():
        assert torch.equal(getattr(block, name).weight.data, expected), name


def test_weights_of_another_dtype_are_those_of_the_checkpoint_in_it(converted, restored, on_rank):
    on_rank(1, 2)
    block = Block(torch.float32)
    block.load_weights(weights(converted("dfloat11")).items())
    for name, expected in block.expected(restored("dfloat11"), 1, 2).items():
        assert torch.equal(getattr(block, name).weight.data, expected.float()), name


def test_a_rank_decodes_its_own_rows_alone(converted, on_rank, monkeypatch):
    on_rank(1, 4)
    block, tensors = Block(), weights(converted("dfloat11"))
    read = {}

    def watch(method, place):
        original = getattr(llmpress.Checkpoint, method)

        def watched(self, name, *args, **kwargs):
            rows = args[place] if len(args) > place else kwargs.get("rows")
            first, end = rows if rows is not None else (0, self[name].shape[0])
            if first != end:
                read.setdefault(name, []).append((first, end))
            return original(self, name, *args, **kwargs)

        monkeypatch.setattr(llmpress.Checkpoint, method, watched)

    watch("torch", 0)
    watch("read_into", 1)
    block.load_weights(tensors.items())
    assert read[f"{BLOCK}self_attn.q_proj.weight"] == [(64, 128)]
    assert read[f"{BLOCK}self_attn.k_proj.weight"] == [(0, 64)]
    assert read[f"{BLOCK}mlp.gate_proj.weight"] == [(192, 384)]
    assert all(name.startswith(BLOCK) for name in read)


def test_columns_are_decoded_some_rows_at_a_time(converted, restored, monkeypatch):
    monkeypatch.setattr("llmpress.vllm.stored.PIECE_BYTES", 50 * HIDDEN * 2)
    name = f"{BLOCK}self_attn.o_proj.weight"
    tensor = weights(converted("fixed12"))[name].narrow(1, 64, 128).narrow(0, 5, 200)
    out, read, expected = torch.empty(200, 128, dtype=torch.bfloat16), [], restored("fixed12").torch(name)[5:205, 64:192]
    original = llmpress.Checkpoint.torch
    monkeypatch.setattr(llmpress.Checkpoint, "torch", lambda self, name, rows: read.append(rows) or original(self, name, rows))
    out.copy_(tensor)
    assert [rows for rows in read if rows != (0, 0)] == [(5, 48), (48, 96), (96, 144), (144, 192), (192, 205)]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["VocabParallelEmbedding", "ParallelLMHead"])
@pytest.mark.parametrize("padding", [64, 640])
def test_vocabularies_are_shared_out_and_padded_with_zeros(kind, ranks, padding, converted, restored, on_rank):
    name = "model.embed_tokens.weight"
    tensor, plain = weights(converted("planes"))[name], restored("planes").torch(name)
    padded = torch.cat([plain, torch.zeros(-VOCABULARY % padding, HIDDEN, dtype=plain.dtype)])
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = getattr(embeddings, kind)(VOCABULARY, HIDDEN, params_dtype=torch.bfloat16, padding_size=padding)
        layer.weight.data.fill_(7)
        layer.weight.weight_loader(layer.weight, tensor)
        assert torch.equal(layer.weight.data, padded.chunk(ranks)[rank])


@pytest.mark.parametrize("to", ENCODINGS)
def test_products_from_compressed_weights_are_those_of_the_plain_ones(to, converted, restored):
    block = Block(torch.float32, LlmpressConfig())
    block.load_weights(weights(converted(to)).items())
    block.finish()
    for name, weight in block.expected(restored(to), 0, 1).items():
        layer = getattr(block, name)
        assert layer.quant_method.kept and layer.weight.numel() == 0, name
        x = torch.sin(torch.arange(3 * weight.shape[1], dtype=torch.float32)).reshape(3, -1)
        found, expected = product(layer, x), x @ weight.float().T
        # Quantised weights are not rounded to BF16 first, and w3a8 quantises x, to 8 bits.
        error = 2e-2 if "a8" in to else 4e-3 if "rtn" in to else 1e-5
        assert (found - expected).abs().max() <= error * expected.abs().max(), name
        bias = torch.ones(weight.shape[0])
        assert torch.equal(layer.quant_method.apply(layer, x, bias), found + 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_fused_in_the_checkpoint_is_one_matrix(ranks, converted, restored, on_rank):
    on_rank(ranks - 1, ranks)
    name = f"{BLOCK}mlp.up_proj.weight"
    layer = linears.MergedColumnParallelLinear(HIDDEN, [256, 512], bias=False, params_dtype=torch.float32, quant_config=LlmpressConfig())
    layer.weight.weight_loader(layer.weight, weights(converted("fixed12"))[name])
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.kept == (ranks == 1)
    x, plain = torch.sin(torch.arange(2 * HIDDEN, dtype=torch.float32)).reshape(2, -1), restored("fixed12").torch(name).float()
    expected = x @ torch.cat([part.chunk(ranks)[-1] for part in plain.split([256, 512])]).T
    assert (product(layer, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_compressed_products_can_be_compiled(converted):
    block = Block(torch.float32, LlmpressConfig())
    block.load_weights(weights(converted("dfloat11")).items())
    block.finish()
    x = torch.ones(3, HIDDEN)
    compiled = torch.compile(lambda x: product(block.qkv, x) * 2, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), product(block.qkv, x) * 2)


@pytest.mark.parametrize("rank, ranks", [(0, 2), (3, 4)])
def test_what_is_only_a_part_of_a_matrix_is_decoded(rank, ranks, converted, restored, on_rank):
    on_rank(rank, ranks)
    block = Block(torch.float32, LlmpressConfig())
    block.load_weights(weights(converted("dfloat11")).items())
    block.finish()
    for name, weight in block.expected(restored("dfloat11"), rank, ranks).items():
        layer = getattr(block, name)
        assert layer.quant_method.kept == (name == "replicated"), name
        x = torch.sin(torch.arange(3 * weight.shape[1], dtype=torch.float32)).reshape(3, -1)
        expected = x @ weight.float().T
        assert (product(layer, x) - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def embedding_of(kind, directory, dtype=torch.float32, padding=64):
    layer = getattr(embeddings, kind)(VOCABULARY, HIDDEN, params_dtype=dtype, quant_config=LlmpressConfig(), padding_size=padding)
    layer.weight.weight_loader(layer.weight, weights(directory)["model.embed_tokens.weight"])
    return layer


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_compressed_embeddings_give_the_rows_of_the_plain_one(ranks, converted, restored, on_rank):
    plain = restored("fixed12").torch("model.embed_tokens.weight").float()
    ids = torch.tensor([[0, 1, 1023, 1024], [2047, 2048, 4095, 7]])
    total = 0
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = embedding_of("VocabParallelEmbedding", converted("fixed12"))
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.quant_method.kept
        total = total + layer(ids)
    assert torch.equal(total, plain[ids])
    with pytest.raises(llmpress.InvalidError, match="past the"):
        layer.quant_method.embedding(layer, torch.tensor([VOCABULARY]))


def test_a_padded_head_gives_zeros_past_the_vocabulary(converted, restored):
    head = embedding_of("ParallelLMHead", converted("fixed12"), padding=640)
    head.quant_method.process_weights_after_loading(head)
    assert head.quant_method.kept
    x = torch.sin(torch.arange(2 * HIDDEN, dtype=torch.float32)).reshape(2, -1)
    logits, expected = product(head, x), x @ restored("fixed12").torch("model.embed_tokens.weight").float().T
    assert logits.shape == (2, 4480) and not logits[:, VOCABULARY:].any()
    assert (logits[:, :VOCABULARY] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tied_head_shares_what_its_embedding_holds(ranks, converted, restored, on_rank):
    on_rank(ranks - 1, ranks)
    head = embeddings.ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=torch.float32, quant_config=LlmpressConfig())
    embedding = embeddings.VocabParallelEmbedding(VOCABULARY, HIDDEN, params_dtype=torch.float32, quant_config=LlmpressConfig())
    head = head.tie_weights(embedding)
    embedding.weight.weight_loader(embedding.weight, weights(converted("fixed12"))["model.embed_tokens.weight"])
    embedding.quant_method.process_weights_after_loading(embedding)
    # A rank's rows alone are no matrix to multiply by.
    assert embedding.quant_method.kept == (ranks == 1)
    x = torch.sin(torch.arange(2 * HIDDEN, dtype=torch.float32)).reshape(2, -1)
    plain = restored("fixed12").torch("model.embed_tokens.weight").float().chunk(ranks)[-1]
    expected = x @ plain.T
    assert (product(head, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(embedding.quant_method.embedding(embedding, torch.tensor([5, 0])), plain[[5, 0]])


def test_raw_matrices_and_changed_numbers_become_usual_weights(converted, restored):
    raw = embedding_of("ParallelLMHead", converted("dfloat11"))
    raw.quant_method.process_weights_after_loading(raw)
    plain = restored("dfloat11").torch("model.embed_tokens.weight").float()
    x = torch.ones(1, HIDDEN)
    assert not raw.quant_method.kept and torch.allclose(product(raw, x)[:, :VOCABULARY], x @ plain.T)
    tensors = weights(converted("dfloat11"))
    layer = Block(torch.float32, LlmpressConfig()).merged
    gate, up = (tensors[f"{BLOCK}mlp.{each}_proj.weight"] for each in ("gate", "up"))
    layer.weight.weight_loader(layer.weight, gate, 0)
    layer.weight.weight_loader(layer.weight, up * 2, 1)
    layer.quant_method.process_weights_after_loading(layer)
    expected = torch.cat([gate.float() + 0, up.float() * 2])
    assert not layer.quant_method.kept and torch.allclose(product(layer, x), x @ expected.T, rtol=1e-4, atol=1e-4)


def test_kept_weights_are_let_go_with_their_layer(converted):
    from llmpress.vllm import kept

    gc.collect()
    before = len(kept._kept)
    block = Block(torch.float32, LlmpressConfig())
    block.load_weights(weights(converted("dfloat11")).items())
    block.finish()
    assert len(kept._kept) == before + 5
    with pytest.raises(llmpress.UnsupportedError, match="again"):
        block.load_weights(weights(converted("dfloat11")).items())
    del block
    gc.collect()
    assert len(kept._kept) == before


def test_items_of_a_stack_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    source = ROOT / "model" / "tests" / "golden" / "gpt_oss"
    plain = llmpress.open(source)
    llmpress.convert(source, tmp_path / "out", to="planes")
    name = next(name for name, info in plain.items() if len(info.shape) == 3)
    tensor, expected = stored(llmpress.open(tmp_path / "out"), name), plain.torch(name)
    item = tensor[1]
    assert isinstance(item, Stored) and item.shape == expected[1].shape
    assert torch.equal(torch.empty_like(expected[1]).copy_(item), expected[1])
    assert torch.equal(item[:, 1:3] + 0, expected[1][:, 1:3]) and torch.equal(item.t() + 0, expected[1].t())
    assert torch.equal(tensor[-1] + 0, expected[-1]) and torch.equal(tensor[1:] + 0, expected[1:])


def test_any_other_operation_is_done_with_decoded_numbers(converted, restored):
    name = f"{BLOCK}mlp.up_proj.weight"
    tensor, plain = weights(converted("dfloat11"))[name], restored("dfloat11").torch(name)
    assert isinstance(tensor, Stored) and tensor.shape == plain.shape and tensor.dtype == plain.dtype and "up_proj" in repr(tensor)
    assert torch.equal(tensor.float(), plain.float()) and torch.equal(tensor.t() + 0, plain.t())
    assert torch.equal(tensor[3] + 0, plain[3]) and torch.equal(tensor[::2] + 0, plain[::2]) and tensor[5:3].shape == (0, HIDDEN)
    assert torch.equal(torch.cat([tensor.narrow(0, 1, 2), tensor[-2:]]), torch.cat([plain[1:3], plain[-2:]]))
    assert [torch.equal(a + 0, b) for a, b in zip(tensor.chunk(3), plain.chunk(3))] == [True] * 3
    assert torch.equal(torch.zeros(2, *plain.shape).copy_(tensor), plain.float().expand(2, -1, -1))
    with pytest.raises(llmpress.UnsupportedError, match="write"):
        tensor.mul_(2)
    assert isinstance(tensor, Stored) and Part(tensor.part.checkpoint, name, (0, 1), (0, 1)).is_whole is False


def test_every_tensor_is_there_under_its_own_name(tinylm, converted):
    plain = llmpress.open(tinylm)
    for directory in (converted("dfloat11"), tinylm):
        tensors = weights(directory)
        assert list(tensors) == list(plain)
        for name, tensor in tensors.items():
            assert torch.equal(tensor + 0, plain.torch(name)), name


def test_a_model_is_loaded_and_what_is_missing_is_named(converted):
    loader = get_model_loader(LoadConfig(load_format="llmpress", model_loader_extra_config={"num_threads": 1}))
    assert isinstance(loader, ours.LlmpressModelLoader)

    config = model_config(converted("fixed12"))
    block = Block()
    loader.load_weights(block, config)
    block.extra = torch.nn.Parameter(torch.zeros(1))
    monkeyed = block.load_weights
    block.load_weights = lambda tensors: monkeyed(tensors) - {"extra"}
    with pytest.raises(ValueError, match="extra"):
        loader.load_weights(block, config)


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_that_the_model_would_leave_out_is_refused(differs, tinylm, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    shutil.copytree(tinylm, tmp_path / "model")
    plain = llmpress.open(tinylm)
    tensors = {name: plain.torch(name, copy=True) for name in plain}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += differs
    for path in (tmp_path / "model").glob("model*"):
        path.unlink()
    safetensors.save_file(tensors, tmp_path / "model" / "model.safetensors")
    llmpress.convert(tmp_path / "model", tmp_path / "out", to="planes")
    loader = get_model_loader(LoadConfig(load_format="llmpress"))
    loader.load_weights(Block(), model_config(tmp_path / "out", tied=False))
    if not differs:
        loader.load_weights(Block(), model_config(tmp_path / "out"))
        return
    with pytest.raises(llmpress.UnsupportedError, match="another matrix.*hf-overrides"):
        loader.load_weights(Block(), model_config(tmp_path / "out"))


def test_vllm_finds_the_plug_in_and_knows_its_names():
    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    (entry,) = [entry for entry in entries if entry.name == "llmpress"]
    assert entry.load() is llmpress.vllm.register
    before = EngineArgs.create_model_config
    llmpress.vllm.register()
    assert EngineArgs.create_model_config is before
    assert get_quantization_config("llmpress") is LlmpressConfig
    assert LlmpressConfig.from_config({}).get_name() == "llmpress"


def test_the_load_format_is_chosen_for_directories_that_need_it(tinylm, converted, restored, tmp_path):
    def chosen(directory, **options):
        args = EngineArgs(model=str(directory), **options)
        args.create_model_config()
        return args.load_format

    assert chosen(converted("dfloat11")) == chosen(converted("rtn:w4,g64")) == "llmpress"
    shutil.copytree(converted("dfloat11"), tmp_path / "official")
    (tmp_path / "official" / "llmpress.json").unlink()
    assert chosen(tmp_path / "official") == "llmpress"
    assert chosen(tinylm) == chosen(restored("dfloat11").root) == "auto"
    assert chosen(converted("dfloat11"), load_format="dummy") == "dummy"
    assert chosen(tinylm, quantization="llmpress") == "llmpress"
    with pytest.raises(llmpress.InvalidError, match="load-format"):
        chosen(converted("dfloat11"), quantization="llmpress", load_format="safetensors")


def test_names_of_the_hub_are_downloaded_as_vllm_would(converted, monkeypatch):
    asked = {}

    def snapshot_download(model, **options):
        asked.update(options, model=model)
        return str(converted("fixed12"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loader = get_model_loader(LoadConfig(load_format="llmpress", download_dir="CACHE"))
    assert loader.open("org/name", "a1b2").root == Path(converted("fixed12"))
    assert (asked["model"], asked["revision"], asked["cache_dir"], asked["ignore_patterns"]) == ("org/name", "a1b2", "CACHE", ["original/**/*"])


def test_what_vllm_would_compute_wrongly_is_refused(tinylm, converted, tmp_path, monkeypatch):
    with pytest.raises(llmpress.UnsupportedError, match="rotation of.*vLLM"):
        weights(converted("rtn:w4,rotate"))
    options = {"to": "drop:attn=2+fixed12", "calib": tinylm / "calib.txt", "calib_windows": 1, "calib_window": 32}
    llmpress.convert(tinylm, tmp_path / "pruned", **options)
    with pytest.raises(llmpress.UnsupportedError, match="portable"):
        weights(tmp_path / "pruned")
    with pytest.raises(llmpress.InvalidError, match="enable_multithread_load"):
        weights(tinylm, model_loader_extra_config={"enable_multithread_load": True})
    with pytest.raises(llmpress.InvalidError, match="num_threads"):
        weights(tinylm, model_loader_extra_config={"num_threads": 0})
    with pytest.raises(llmpress.InvalidError, match="no safetensors"):
        weights(tmp_path)
    monkeypatch.setattr("llmpress.vllm.quantization.current_platform", type("Gpu", (), {"is_cpu": staticmethod(lambda: False)}))
    with pytest.raises(llmpress.UnsupportedError, match="processor"):
        Block(config=LlmpressConfig())


def test_methods_are_given_to_linears_and_embeddings_alone():
    config = LlmpressConfig()
    assert config.get_quant_method(torch.nn.Linear(1, 1), "attn") is None
    assert isinstance(Block(config=config).qkv.quant_method, LlmpressMethod)
