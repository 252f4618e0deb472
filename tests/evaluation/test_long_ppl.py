"""LongPPL as a benchmark and beside the loss on books: by hand, by another model's choice, and what is a gap."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.config import TrainConfig
from refine_lab.evaluation import books, long_ppl
from refine_lab.evaluation.benchmark import Missing, Setting
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.run import evaluate
from refine_lab.evaluation.texts import document_batch
from refine_lab.models.hub import SHIPPED
from refine_lab.runs.writer import RunWriter
from refine_lab.training.evaluation import next_token
from refine_lab.training.key_tokens import key_tokens
from tests.factories.evaluation import loaded, small_tokenizer
from tests.support.paths import TEXT
from tests.support.refusals import naming

LENGTH = 800


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two books of two texts each."""
    folder, texts = tmp_path_factory.mktemp("books"), [path.read_text() for path in sorted(TEXT.glob("*.txt"))]
    for number in range(2):
        (folder / f"{number}.txt").write_text("\n".join(texts[number::2][:2]))
    return folder


def setting(books: Path, **fields) -> Setting:
    return Setting(**{"tokenizer": loaded()[1], "books": books, "length": LENGTH, **fields})


@pytest.fixture
def lm() -> RefineLM:
    return RefineLM(*loaded())


def test_the_metrics_are_over_all_key_tokens_with_a_jackknife_over_documents(folder, lm):
    found = long_ppl.measure(lm, setting(folder))
    batch = document_batch(setting(folder), lm.encoder, LENGTH, 64)
    rows = [next_token(lm.policy, row := batch.rows(i, i + 1), 1, key_tokens(lm.policy, row)) for i in range(2)]
    counts, losses = ([row[name] for row in rows] for name in ("key_tokens", "key_loss"))
    mean = sum(n * x for n, x in zip(counts, losses, strict=True)) / sum(counts)
    assert all(counts) and found.metrics["key_loss"].value == pytest.approx(mean, rel=1e-6)
    assert found.metrics["long_ppl"].value == pytest.approx(math.exp(mean), rel=1e-6)
    without = [math.exp(loss) for loss in losses]  # of two documents, each is left out once
    assert found.metrics["long_ppl"].stderr == pytest.approx(abs(without[0] - without[1]) / 2, rel=1e-6)
    assert found.metrics["ntp_loss"].value == pytest.approx(sum(row["ntp_loss"] for row in rows) / 2, rel=1e-6)
    assert not any(metric.higher_is_better for metric in found.metrics.values())
    assert found.facts["key_tokens"] == sum(counts) and found.facts["key_tokens_by"] == lm.name


def test_books_have_long_ppl_beside_their_loss_on_the_first_sequences(folder, lm, monkeypatch):
    found = books.measure(lm, setting(folder))
    assert found.metrics.keys() == {"ntp_accuracy", "ntp_loss", "sampled_accuracy", "long_ppl", "key_loss"}
    counts = [row["key_tokens"] for row in found.rows]
    assert len(counts) > 3 and found.facts["key_tokens"] == sum(counts) > 0
    monkeypatch.setattr(books, "DOCUMENTS", 2)
    fewer = books.measure(lm, setting(folder))
    assert [row["key_tokens"] for row in fewer.rows] == counts[:2] + [0] * (len(counts) - 2)
    assert fewer.metrics["ntp_loss"] == found.metrics["ntp_loss"]


def test_another_model_may_choose(folder, lm):
    torch.manual_seed(0)
    policy, tokenizer = loaded()
    other = RefineLM(type(policy)(policy.config).eval(), tokenizer)
    own, chosen = (long_ppl.measure(lm, setting(folder, key_model=name)) for name in (None, "tiny-deltanet"))
    assert own.metrics == chosen.metrics and chosen.facts["key_tokens_by"] == "tiny-deltanet"
    untrained = long_ppl.measure(other, setting(folder, key_model="tiny-deltanet"))
    assert untrained.facts["key_tokens"] == own.facts["key_tokens"]
    assert untrained.metrics["key_loss"].value > own.metrics["key_loss"].value + 1


def test_what_has_no_key_token_is_a_gap_and_books_are_measured_without(folder, lm):
    with naming(Missing, "200 tokens", 256):
        long_ppl.measure(lm, setting(folder, length=200))
    found = books.measure(lm, setting(folder, length=200))
    assert found.metrics.keys() == {"ntp_accuracy", "ntp_loss", "sampled_accuracy"}


def test_a_model_that_cannot_choose_is_a_gap(folder, lm, tmp_path):
    with naming(Missing, "nowhere/here"):
        long_ppl.measure(lm, setting(folder, key_model="nowhere/here"))
    policy, _ = loaded()
    policy.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    with naming(Missing, str(tmp_path), "--key-model"):
        long_ppl.measure(lm, setting(folder, key_model=str(tmp_path)))


def test_an_evaluated_run_is_measured_on_the_tokens_of_the_model_that_it_started_from(folder, tmp_path):
    config = TrainConfig(recipe="test", model="tiny-deltanet", refine=None)
    with RunWriter.create(config, tmp_path / "runs") as writer, writer.checkpoint(3) as checkpoint:
        shutil.copytree(SHIPPED / "tiny-deltanet", checkpoint, dirs_exist_ok=True)
    chosen = {"tasks": ("long_ppl",), "lengths": (LENGTH,), "books": str(folder), "device": "cpu"}
    names = []
    for number, fields in enumerate(({}, {"key_model": str(writer.path)})):
        out = tmp_path / f"out-{number}"
        evaluate(EvaluationConfig(model=str(writer.path), **chosen, **fields), out, lambda line: None)
        (unit,) = json.loads((out / "results.json").read_text())["units"]
        names.append(unit["facts"]["key_tokens_by"])
        assert unit["metrics"]["long_ppl"]["value"] > 1
    assert names == ["tiny-deltanet", str(writer.path)]
