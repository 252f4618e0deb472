"""Every task of the catalogue between two ends: an oracle that is always right, and a model with random weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation import longbench, niah, short
from refine_lab.evaluation.benchmark import Measured, Setting
from refine_lab.evaluation.catalogue import BENCHMARKS
from refine_lab.evaluation.model import RefineLM
from refine_lab.models.loading import manifest_of
from tests.factories.benchmarks import write_books, write_released_longbench, write_short
from tests.factories.evaluation import Oracle, loaded, write_ruler
from tests.factories.oracles import copying_model, table_model

LENGTH = 256
CHANCE = {"piqa": 1 / 2, "winogrande": 1 / 2, "hellaswag": 1 / 4, "arc_easy": 1 / 4, "arc_challenge": 1 / 4}
"""Task -> score of guessing among its choices."""
SHARED_LETTERS = 0.4
"""Similarity of unrelated lines of code in the letters that they share by chance."""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets come from local files, and are cached in the test's own folder."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def measure(name: str, lm: RefineLM, **fields) -> Measured:
    tokenizer = loaded()[1]
    return BENCHMARKS[name].measure(lm, Setting(tokenizer=tokenizer, manifest=manifest_of("tiny-deltanet"), **fields))


def main(name: str, lm: RefineLM, **fields) -> float:
    return measure(name, lm, **fields).metrics[BENCHMARKS[name].main].value


def random_model(**reading) -> RefineLM:
    return RefineLM(*loaded("new:tiny-deltanet"), **reading)


def guessing(name: str, samples: int) -> tuple[float, float]:
    """Four standard errors around the score of guessing."""
    share = CHANCE[name]
    width = 4 * math.sqrt(share * (1 - share) / samples)
    return share - width, share + width


def test_every_task_has_its_two_ends():
    """The tests below cover each group; those of the needles are in test_niah.py."""
    covered = {*niah.VARIANTS, "ruler_squadqa", "ruler_hotpotqa", *(f"longbench_{task}" for task in longbench.TASKS)}
    assert covered | {*short.TASKS, "books", "rewards", "recall", "unseen_rest", "long_ppl"} == set(BENCHMARKS)


@pytest.mark.parametrize("kind", ["squadqa", "hotpotqa"])
def test_rulers_questions(kind, tmp_path):
    write_ruler(tmp_path, kind)
    found = measure(f"ruler_{kind}", Oracle(*loaded()), data=tmp_path, length=512)
    assert found.metrics["any_match"].value == found.metrics["f1"].value == 1
    assert main(f"ruler_{kind}", random_model(), data=tmp_path, length=512) <= 0.05


WRITES_LONG = ("qmsum", "multi_news")
"""Tasks whose answers have up to 512 tokens, which a model with random weights all writes."""


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[pytest.mark.slow] * (task in WRITES_LONG)) for task in longbench.TASKS]
)
def test_longbench(task, tmp_path):
    write_released_longbench(tmp_path, task)
    oracle = Oracle(*loaded())
    if longbench.TASKS[task].cut == "whole":
        oracle.before = oracle.rest = ""
    found = measure(f"longbench_{task}", oracle, data=tmp_path)
    assert found.count == found.items == 8
    assert found.metrics["score"].value == pytest.approx(1, abs=1e-6)
    assert found.metrics["empty_answer"].value == 0
    chance = main(f"longbench_{task}", random_model(), data=tmp_path)
    assert chance <= (SHARED_LETTERS if longbench.TASKS[task].metric == "code_sim" else 0.05)


@pytest.mark.parametrize("name", CHANCE)
def test_choices(name, tmp_path):
    write_short(tmp_path, name)
    found = measure(name, Oracle(*loaded()), data=tmp_path)
    assert found.count == 40 and all(metric.value == 1 for metric in found.metrics.values())
    low, high = guessing(name, 40)
    assert low <= main(name, random_model(), data=tmp_path) <= high


@pytest.mark.parametrize("name", ["wikitext", "lambada_openai"])
def test_perplexities(name, tmp_path):
    write_short(tmp_path, name)
    assert main(name, Oracle(*loaded()), data=tmp_path) == 1
    found = measure(name, random_model(), data=tmp_path)
    uniform = len(loaded()[1])  # a word has at least one token
    assert found.metrics[BENCHMARKS[name].main].value > uniform / 2
    if name == "lambada_openai":
        assert measure(name, Oracle(*loaded()), data=tmp_path).metrics["acc"].value == 1
        assert found.metrics["acc"].value == 0


@pytest.mark.parametrize("name", ["fda", "swde"])
def test_values_in_documents(name, tmp_path):
    write_short(tmp_path, name, rows=12)
    assert main(name, Oracle(*loaded()), data=tmp_path) == 1
    assert main(name, random_model(), data=tmp_path) == 0


# -- tasks of a text's tokens --------------------------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return tmp_path / "books"


@pytest.fixture
def table(books: Path):
    """A model that continues the texts of `books` with certainty."""
    tokenizer = loaded()[1]
    return table_model(write_books(books, tokenizer), len(tokenizer)), tokenizer


def test_books(books, table):
    right = measure("books", RefineLM(*table), books=books, length=LENGTH, limit=6).metrics
    assert right["ntp_accuracy"].value == right["sampled_accuracy"].value == 1
    assert right["ntp_loss"].value == pytest.approx(0, abs=1e-3)
    wrong = measure("books", random_model(), books=books, length=LENGTH, limit=6).metrics
    assert wrong["ntp_accuracy"].value <= 0.05 and wrong["ntp_loss"].value > 0.9 * math.log(len(table[1]))


def test_long_ppl(books, table, monkeypatch):
    monkeypatch.setattr("refine_lab.training.key_tokens.THRESHOLD", 0.0)  # every token is one, whoever chooses
    right = measure("long_ppl", RefineLM(*table), books=books, length=LENGTH, limit=4)
    assert right.metrics["long_ppl"].value == pytest.approx(1, abs=1e-3)
    assert right.facts["key_tokens"] == 4 * (LENGTH - 1)
    wrong = measure("long_ppl", random_model(), books=books, length=LENGTH, limit=4).metrics
    assert wrong["long_ppl"].value > len(table[1]) ** 0.9


def test_rewards(books, table):
    right = measure("rewards", RefineLM(*table), books=books, length=LENGTH, limit=4).metrics
    for name, metric in right.items():
        assert metric.value == pytest.approx(2 if name.startswith("hybrid") else 1, abs=1e-4), name
    wrong = measure("rewards", random_model(), books=books, length=LENGTH, limit=4).metrics
    assert all(metric.value <= 0.05 for name, metric in wrong.items() if name.startswith("binary"))
    assert all(metric.value < 0.95 for name, metric in wrong.items() if name.startswith("cosine")), "it has no end at 0"


def test_recall():
    tokenizer = loaded()[1]
    right = measure("recall", RefineLM(copying_model(tokenizer), tokenizer), length=LENGTH, limit=4).metrics
    assert {name: metric.value for name, metric in right.items()} == dict.fromkeys(right, 1.0)
    wrong = measure("recall", random_model(), length=LENGTH, limit=4).metrics
    assert all(metric.value <= 0.05 for metric in wrong.values())


def test_unseen_rest(books, table):
    settings = {"ttt": "sft", "ttt_steps": 1}
    right = measure("unseen_rest", RefineLM(*table, **settings), books=books, length=LENGTH, limit=2).metrics
    assert all(metric.value == pytest.approx(0, abs=1e-3) for metric in right.values())
    wrong = measure("unseen_rest", random_model(**settings), books=books, length=LENGTH, limit=2).metrics
    assert wrong["loss_before"].value > 0.9 * math.log(len(table[1]))
