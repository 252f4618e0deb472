"""The shipped models: their size, their cards, and the cards' figures measured again on the shipped files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.model_card import NOT_UPDATED, held_out, measure, prediction, table
from refine_lab.data.batches import SequenceData
from refine_lab.data.corpus import compare
from refine_lab.models import FastWeightLM, hub, load_model
from refine_lab.models.hub import SHIPPED
from refine_lab.models.loading import load_tokenizer, manifest_of
from refine_lab.runs.checkpoints import facts_of
from refine_lab.training.evaluation import exact_recall, recall_documents
from tests.factories.durable_runs import flip_bit
from tests.support.refusals import naming

BARS = {
    "tiny-deltanet": {("word-1", 512): 0.95, ("word-1", 1024): 0.85, ("word-4", 512): 0.80, ("number-1", 512): 0.80},
    "tiny-lact": {("word-1-d128", 256): 0.80, ("word-1-d128", 512): 0.80},
}
A_FEW = {
    "tiny-deltanet": {("word-1", 512): 0.9, ("word-4", 512): 0.7, ("number-1", 512): 0.7},
    "tiny-lact": {("word-1-d128", 256): 0.75, ("word-1-d128", 512): 0.75},
}
"""The same on a few documents only: kind and tokens -> share."""
CODE_ACCURACY = 0.45
NTP_POINTS = 0.02
"""How far tiny-lact's accuracy may lie below that of tiny-deltanet after as many tokens."""


@pytest.fixture(scope="module", params=BARS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def figures(name: str) -> dict[str, Any]:
    """What the card quotes."""
    return figures_of(name)


def figures_of(name: str) -> dict[str, Any]:
    return json.loads((SHIPPED / name / "figures.json").read_text())


@pytest.fixture(scope="module")
def comparable(name: str) -> None:
    """Skips where the installed packages are too different from those that the card was measured on."""
    manifest = manifest_of(name)
    assert manifest is not None
    report = compare(manifest)
    if not report.comparable:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{report}, and CI is true")
        pytest.skip(str(report))


@pytest.fixture(scope="module")
def shipped(name: str, comparable) -> tuple[FastWeightLM, PreTrainedTokenizerBase, SequenceData]:
    policy, tokenizer = load_model(name, device="cpu")
    return policy, tokenizer, held_out(manifest_of(name), tokenizer, rows=8)


def test_it_is_small(name):
    assert sum(path.stat().st_size for path in (SHIPPED / name).rglob("*") if path.is_file()) <= 12 * 2**20


def test_the_card_quotes_the_figures_of_these_very_weights(name, figures):
    digest = hashlib.sha256((SHIPPED / name / "model.safetensors").read_bytes()).hexdigest()
    assert figures["weights_sha256"] == digest, "figures.json was measured on other weights"
    assert figures["settings"]["documents"] == 200 and figures["code"]["rows"] >= 64
    card = (SHIPPED / name / "README.md").read_text()
    missing = [line for line in table(figures).splitlines() if line not in card]
    assert not missing, "the card lacks lines of the table that `python -m benchmarks.model_card` prints"


def test_the_cards_figures_reach_the_bars(name, figures):
    for (kind, length), bar in BARS[name].items():
        assert figures["recall"][kind][str(length)] >= bar, f"{kind} at {length} tokens"
    assert all(0 <= share <= 1 for shares in figures["recall"].values() for share in shares.values())
    assert figures["code"]["ntp_accuracy"] >= CODE_ACCURACY
    assert 0 < figures["code"]["bits_per_byte"] < figures["prose"]["bits_per_byte"] < 8


def test_what_lact_recalls_stands_in_its_fast_weights():
    recalled = figures_of("tiny-lact")["recall"]
    assert recalled[f"word-1-d128, {NOT_UPDATED}"]["256"] <= 0.05 < recalled["word-1-d128"]["256"]


def test_lact_predicts_as_well_as_deltanet_after_as_many_tokens():
    lact, deltanet = (figures_of(name)["code"]["ntp_accuracy"] for name in ("tiny-lact", "tiny-deltanet"))
    assert lact >= deltanet - NTP_POINTS
    read = {name: int(curve(name)[-1]["tokens"]) for name in BARS}
    assert read["tiny-lact"] == pytest.approx(read["tiny-deltanet"], rel=0.02)


def curve(name: str) -> list[dict[str, str]]:
    with (SHIPPED / name / "curves.csv").open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def test_it_recalls_what_it_should(name, shipped):
    """A few documents; `test_every_figure_of_the_card_again` has all."""
    policy, _, data = shipped
    for (kind, length), bar in A_FEW[name].items():
        assert exact_recall(policy, recall_documents(kind, 24, length, data)) >= bar, kind


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
def test_every_figure_of_the_card_again(name, comparable, figures):
    again = measure(name)
    for (kind, length), bar in BARS[name].items():
        assert again["recall"][kind][str(length)] >= bar, f"{kind} at {length} tokens"
    assert again["code"]["ntp_accuracy"] >= CODE_ACCURACY
    for kind, shares in figures["recall"].items():
        for length, share in shares.items():
            assert again["recall"][kind][length] == pytest.approx(share, abs=0.03), f"{kind} at {length} tokens"
    for measured in ("ntp_loss", "ntp_accuracy", "bits_per_byte"):
        assert again["code"][measured] == pytest.approx(figures["code"][measured], rel=0.02), measured


def test_every_file_that_is_loaded_has_its_digest(name: str) -> None:
    """After a change: `facts_of` each file in `digests.json`."""
    listed = json.loads(hub.DIGESTS.read_text())[name]
    loaded = {path.name for path in (SHIPPED / name).iterdir()} - {"README.md", "curves.csv", "figures.json"}
    assert listed == {file: facts_of(SHIPPED / name / file) for file in loaded}


def test_a_damaged_file_of_a_shipped_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SHIPPED, tmp_path / "shipped")
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "shipped")
    path = tmp_path / "shipped" / "tiny-deltanet" / "model.safetensors"
    flip_bit(path, 2**20)
    with naming(ValueError, path, "is damaged"):
        load_model("tiny-deltanet")
    load_tokenizer("tiny-lact")
