"""The shipped model: its size, its card, and the card's figures measured again on the shipped file."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.model_card import held_out, measure, prediction, table
from refine_lab.data.batches import SequenceData
from refine_lab.data.corpus import compare
from refine_lab.evaluation import recall, recall_documents
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.loading import SHIPPED, manifest_of

NAME = "tiny-deltanet"
FOLDER = SHIPPED / NAME
BARS = {("word-1", "512"): 0.95, ("word-1", "1024"): 0.85, ("word-4", "512"): 0.80, ("number-1", "512"): 0.80}
CODE_ACCURACY = 0.45


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """What the card quotes."""
    return json.loads((FOLDER / "figures.json").read_text())


@pytest.fixture(scope="module")
def comparable() -> None:
    """Skips where the installed packages are too different from those that the card was measured on."""
    manifest = manifest_of(NAME)
    assert manifest is not None
    report = compare(manifest)
    if not report.comparable:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{report}, and CI is true")
        pytest.skip(str(report))


@pytest.fixture(scope="module")
def shipped(comparable) -> tuple[FastWeightLM, PreTrainedTokenizerBase, SequenceData]:
    policy, tokenizer = load_model(NAME, device="cpu")
    return policy, tokenizer, held_out(manifest_of(NAME), tokenizer, rows=8)


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12 * 2**20


def test_the_card_quotes_the_figures_of_these_very_weights(figures):
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert figures["weights_sha256"] == digest, "figures.json was measured on other weights"
    assert figures["settings"]["documents"] == 200 and figures["code"]["rows"] >= 64
    card = (FOLDER / "README.md").read_text()
    missing = [line for line in table(figures).splitlines() if line not in card]
    assert not missing, "the card lacks lines of the table that `python -m benchmarks.model_card` prints"


def test_the_cards_figures_reach_the_bars(figures):
    for (kind, length), bar in BARS.items():
        assert figures["recall"][kind][length] >= bar, f"{kind} at {length} tokens"
    assert 0 <= figures["recall"]["number-1"]["1024"] <= 1
    assert figures["code"]["ntp_accuracy"] >= CODE_ACCURACY
    assert 0 < figures["code"]["bits_per_byte"] < figures["prose"]["bits_per_byte"] < 8


def test_it_recalls_words_and_numbers(shipped):
    """A few documents; `test_every_figure_of_the_card_again` has all."""
    policy, _, data = shipped
    for kind, bar in (("word-1", 0.9), ("word-4", 0.7), ("number-1", 0.7)):
        assert recall(policy, recall_documents(kind, 24, 512, data)) >= bar, kind


def test_it_predicts_code(shipped):
    policy, tokenizer, data = shipped
    found = prediction(policy, tokenizer, data.validation())
    assert found["ntp_accuracy"] >= CODE_ACCURACY - 0.03
    assert found["bits_per_byte"] < 1.5


def test_bits_per_byte_counts_the_bytes_of_the_text(shipped):
    """Over a row that is plain text: its tokens' bytes, all but the first token's."""
    policy, tokenizer, data = shipped
    batch = data.validation().rows(0, 1)
    text = tokenizer.decode(batch.tokens[0, 1:].tolist(), skip_special_tokens=True)
    found = prediction(policy, tokenizer, batch)
    assert found["bits_per_byte"] * len(text.encode()) * 0.6931472 == pytest.approx(
        found["ntp_loss"] * batch.num_targets, rel=1e-2
    )


@pytest.mark.slow
def test_every_figure_of_the_card_again(comparable, figures):
    again = measure(NAME)
    for (kind, length), bar in BARS.items():
        assert again["recall"][kind][length] >= bar, f"{kind} at {length} tokens"
    assert again["code"]["ntp_accuracy"] >= CODE_ACCURACY
    for kind, shares in figures["recall"].items():
        for length, share in shares.items():
            assert again["recall"][kind][length] == pytest.approx(share, abs=0.03), f"{kind} at {length} tokens"
    for name in ("ntp_loss", "ntp_accuracy", "bits_per_byte"):
        assert again["code"][name] == pytest.approx(figures["code"][name], rel=0.02), name
