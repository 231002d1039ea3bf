"""Models of transformers that run from compressed weights compute what the restored checkpoint computes."""

from __future__ import annotations

import shutil
import tempfile

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import llmpress
import llmpress.transformers as ours
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()

LOSSLESS = ["dfloat11", "fixed12", "planes", "sparse24:magnitude", "sparse24:magnitude+fixed12"]
LOSSY = ["rtn:w4,g64", "rtn:w3a8", "rtn:w8+dfloat11", "sparse24:magnitude,slorb"]


@pytest.fixture(scope="session")
def restored(converted, tmp_path_factory):
    made = {}

    def make(to):
        if to not in made:
            made[to] = tmp_path_factory.mktemp("restored") / "out"
            llmpress.restore(converted(to), made[to])
        return made[to]

    return make


@pytest.fixture(scope="session")
def ids(tinylm):
    tokenizer = AutoTokenizer.from_pretrained(tinylm)
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
    return tokenizer(text, return_tensors="pt").input_ids


def load(directory, dtype="float32", **config):
    options = {"quantization_config": ours.LlmpressConfig(**config)} if config else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), **options)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def compressed(model):
    return {name for name, module in model.named_modules() if isinstance(module, (ours.Linear, ours.Embedding))}


@pytest.mark.parametrize("to", LOSSLESS)
def test_kernels_give_the_logits_of_the_restored_checkpoint(to, converted, restored, ids):
    model, plain = load(converted(to)), load(restored(to))
    assert compressed(model) and not compressed(plain)
    found, expected = logits(model, ids), logits(plain, ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", [*LOSSLESS, *LOSSY])
def test_products_of_torch_give_the_bits_of_the_restored_checkpoint(to, dtype, converted, restored, ids):
    with pytest.warns(UserWarning, match="quantization_config"):
        model = load(converted(to), dtype, products="torch")
    assert compressed(model)
    assert torch.equal(logits(model, ids), logits(load(restored(to), dtype), ids))


@pytest.mark.parametrize("to", LOSSY)
def test_codes_are_multiplied_as_llmpress_does(to, converted, tinylm, ids):
    # What is multiplied from codes is not rounded to the dtype of the model first, as what is restored is. Where inputs are quantised the last bit of
    # one of them may move it to another code: noise of 1e-6 in the embedding moves this loss by 1e-3.
    error = 5e-3 if "a8" in to else 1e-5
    model = load(converted(to))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    text = AutoTokenizer.from_pretrained(tinylm).decode(ids[0])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text)
        file.flush()
        own = llmpress.eval.ppl(converted(to), text=file.name, window=ids.shape[1], bos="never")
    assert abs(loss - own["nats_per_token"]) < error * own["nats_per_token"]


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama_bias", "mixtral", "phi3", "qwen3_moe", "qwen3_next"])
def test_every_family_computes_what_it_computes_from_plain_weights(family, tmp_path):
    # Renamed, merged and transposed weights, embeddings that are more than that, stacked experts: what no module of ours can hold is decoded.
    source = ROOT / "model" / "tests" / "golden" / family
    llmpress.convert(source, tmp_path / "out", to="planes")
    model = load(tmp_path / "out")
    ids = torch.arange(11)[None] % model.config.vocab_size
    found, expected = logits(model, ids), logits(load(source), ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_matrix_of_the_blocks_stays_compressed(converted):
    model = load(converted("dfloat11"))
    blocks = {name for name in compressed(model) if ".layers." in name}
    per_block = {name.split(".layers.", 1)[1].split(".", 1)[1] for name in blocks}
    assert len(per_block) == 7 and len(blocks) == 7 * model.config.num_hidden_layers
    dense = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1)
    assert dense == 0
    assert "dfloat11" in repr(model)


def test_a_tied_head_and_its_embedding_are_compressed_together(converted, restored, ids):
    model = load(converted("fixed12"))
    assert {"lm_head", "model.embed_tokens"} <= compressed(model)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(embedded, load(restored("fixed12")).get_input_embeddings()(ids))


@pytest.mark.parametrize("to", ["dfloat11", "fixed12", "rtn:w4,g64"])
def test_generated_tokens_are_those_of_the_restored_checkpoint(to, converted, restored, ids):
    options = {"max_new_tokens": 24, "do_sample": False}
    found = load(converted(to), **({"products": "torch"} if to in LOSSY else {})).generate(ids, **options)
    assert torch.equal(found, load(restored(to)).generate(ids, **options))


def test_save_pretrained_keeps_the_directory_as_it_is(converted, tmp_path, ids):
    source = converted("dfloat11")
    model = load(source)
    model.save_pretrained(tmp_path / "saved")
    for path in source.rglob("*"):
        if path.is_file():
            assert (tmp_path / "saved" / path.relative_to(source)).read_bytes() == path.read_bytes(), path
    llmpress.verify(tmp_path / "saved")
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    model.save_pretrained(source)
    assert before == {path: path.stat().st_mtime_ns for path in source.iterdir()}
    with pytest.raises(llmpress.UnsupportedError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)


def test_dequantize_gives_a_model_of_torchs_own_modules(converted, restored, ids):
    model = load(converted("dfloat11")).dequantize()
    assert not compressed(model)
    assert torch.equal(logits(model, ids), logits(load(restored("dfloat11")), ids))


def test_an_official_directory_needs_no_manifest(converted, tmp_path, ids):
    shutil.copytree(converted("dfloat11"), tmp_path / "official")
    (tmp_path / "official" / "llmpress.json").unlink()
    model = load(tmp_path / "official")
    assert compressed(model)
    assert torch.equal(logits(model, ids), logits(load(converted("dfloat11")), ids))


def test_plain_directories_are_left_to_transformers(tinylm, restored):
    for directory in (tinylm, restored("dfloat11")):
        model = load(directory)
        assert not hasattr(model, "hf_quantizer") and getattr(model.config, "quantization_config", None) is None


def test_nothing_is_missing_or_unexpected(converted):
    for to in ("dfloat11", "planes", "rtn:w4,g64"):
        _, info = AutoModelForCausalLM.from_pretrained(converted(to), output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_gradients_are_refused_by_name(converted, ids):
    model = load(converted("dfloat11"))
    x = torch.ones(1, 3, model.config.hidden_size, requires_grad=True)
    y = model.model.layers[0].self_attn.q_proj(x)
    with pytest.raises(llmpress.UnsupportedError, match="derivatives"):
        y.sum().backward()


def test_what_transformers_would_compute_wrongly_is_refused(tinylm, converted, tmp_path):
    with pytest.raises(llmpress.UnsupportedError, match="rotation of"):
        load(converted("rtn:w4,rotate"))
    quantizer = ours.LlmpressQuantizer(ours.LlmpressConfig())
    with pytest.raises(llmpress.UnsupportedError, match="processor"):
        quantizer.validate_environment(device_map={"": torch.device("cuda:0")})
    assert quantizer.update_device_map("auto") == {"": "cpu"}
    with pytest.raises(llmpress.InvalidError, match="products"):
        ours.LlmpressConfig(products="magic")
    options = {"to": "drop:attn=2+fixed12", "calib": tinylm / "calib.txt", "calib_windows": 1, "calib_window": 32}
    llmpress.convert(tinylm, tmp_path / "pruned", **options)
    with pytest.raises(llmpress.UnsupportedError, match="portable"):
        load(tmp_path / "pruned")
    llmpress.convert(tinylm, tmp_path / "portable", portable=True, **options)
    assert compressed(load(tmp_path / "portable"))
