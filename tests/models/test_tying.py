"""Head and embedding, tied or not: the configuration and the file agree after loading, in every family and kind of file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_lab.data.tokenizer import train_tokenizer
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.families import family
from refine_lab.models.loading import _without_report
from tests.factories.hybrids import configuration
from tests.factories.loading import TEXTS, change
from tests.support.refusals import naming

OURS = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=400)
SIZES = {
    "delta_net": dict(num_heads=2),
    "gated_deltanet": dict(num_heads=2, head_dim=8),
    "lact_swiglu": dict(num_attn_heads=2, num_lact_heads=2, lact_chunk_size=16, window_size=16),
    "gla": dict(num_heads=2),
}
FAMILIES = (*SIZES, "qwen3_next", "qwen3_5_text", "olmo_hybrid")
KINDS = ("safetensors", "shards", "pickle")
HEAD = "lm_head.weight"


@pytest.fixture(params=FAMILIES)
def model(request, monkeypatch) -> FastWeightLM:
    """A small random model whose head is not its embedding."""
    if request.param == "gla":
        pytest.importorskip("fla.models", reason="flash-linear-attention is not installed here")
    config_class, model_class = family(request.param)
    monkeypatch.setattr(
        model_class, "devices", ("cpu", "cuda")
    )  # fla's models load anywhere, but do not run on the CPU
    if request.param in SIZES:
        return model_class(config_class(**OURS, **SIZES[request.param], tie_word_embeddings=False))
    return model_class(configuration(request.param, vocab_size=400, tie_word_embeddings=False))


def save(model: FastWeightLM, folder: Path, kind: str) -> Path:
    size = "20KB" if kind == "shards" else "5GB"
    model.save_pretrained(folder, max_shard_size=size)
    if kind == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    train_tokenizer(TEXTS, 400).save_pretrained(folder)
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in folder.glob("*.safetensors")]
    parts += [torch.load(path, weights_only=True) for path in folder.glob("*.bin")]
    return {name: x for part in parts for name, x in part.items()}


def drop_head(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({name: x for name, x in load_file(path).items() if name != HEAD}, path, {"format": "pt"})
    for path in folder.glob("*.bin"):
        torch.save({name: x for name, x in torch.load(path, weights_only=True).items() if name != HEAD}, path)
    if (index := folder / "model.safetensors.index.json").is_file():
        known = json.loads(index.read_text())
        known["weight_map"].pop(HEAD)
        index.write_text(json.dumps(known))


def head_and_embedding(model: FastWeightLM) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_output_embeddings().weight, model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_its_own_is_kept_where_the_configuration_says_tied(model, tmp_path, kind):
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    folder = save(model, tmp_path / "first", kind)
    change(folder, tie_word_embeddings=True)
    with pytest.warns(
        UserWarning, match=r"sets tie_word_embeddings to True, but the weights contain a head that differs"
    ):
        loaded, tokenizer = load_model(folder, device="cpu", allow_pickle=True)
    for found in (loaded, _saved_and_loaded(loaded, tokenizer, tmp_path / "second")):
        assert found.config.tie_word_embeddings is False
        found.tie_weights()
        assert found.state_dict().keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in found.state_dict().items())


def _saved_and_loaded(model: FastWeightLM, tokenizer, folder: Path) -> FastWeightLM:
    """Without a warning, which would be an error here."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert {HEAD} <= tensors_in(folder).keys()
    return load_model(folder, device="cpu")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_missing_where_the_configuration_says_untied_is_refused_by_name(model, tmp_path, kind):
    folder = save(model, tmp_path, kind)
    drop_head(folder)
    assert HEAD not in tensors_in(folder)
    with naming(ValueError, "config.json", "lm_head.weight") as caught:
        load_model(folder, device="cpu", allow_pickle=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["twice", "once"])
def test_one_matrix_stored_once_or_twice_is_tied_without_a_word(model, tmp_path, kind, stored):
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    folder = save(model, tmp_path, kind)
    if stored == "once":
        drop_head(folder)
    change(folder, tie_word_embeddings=True)
    loaded, _ = load_model(folder, device="cpu", allow_pickle=True)
    head, embedding = head_and_embedding(loaded)
    assert head is embedding and loaded.config.tie_word_embeddings is True


def test_of_what_transformers_says_while_it_loads_only_its_table_is_hidden(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with _without_report():
        logging.getLogger("transformers.modeling_utils").warning("Some LOAD REPORT from: a folder")
        logging.getLogger("transformers.modeling_utils").warning("Some LOAD REPORT of a CONVERSION")
        for name in ("modeling_utils", "configuration_utils", "generation.configuration_utils"):
            logging.getLogger(f"transformers.{name}").warning("a warning of %s", name)
    logging.getLogger("transformers.modeling_utils").warning("Another LOAD REPORT")
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == [
        "Some LOAD REPORT of a CONVERSION",
        "a warning of modeling_utils",
        "a warning of configuration_utils",
        "a warning of generation.configuration_utils",
        "Another LOAD REPORT",
    ]


def test_transformers_own_warning_about_the_head_passes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config_class, model_class = family("delta_net")
    model = model_class(config_class(**OURS, **SIZES["delta_net"], tie_word_embeddings=False))
    change(save(model, tmp_path, "safetensors"), tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings is now False"):
        load_model(tmp_path)
    assert any("tie" in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)
