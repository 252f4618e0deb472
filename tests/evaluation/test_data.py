"""The files of the benchmarks in ../shared/data: a few samples of each, and all of them under `make long`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation import longbench, ruler_qa, short
from refine_lab.evaluation.benchmark import Measured, Setting
from refine_lab.evaluation.catalogue import BENCHMARKS, Unit, units
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.run import evaluate
from tests.factories.evaluation import Oracle, loaded

PAPER = [(f"ruler_{kind}", length) for kind in ("squadqa", "hotpotqa") for length in (4096, 8192)]
MADE = [("ruler_squadqa", 1024), ("ruler_hotpotqa", 2048)]
LONGBENCH = {"qasper": 191, "multifieldqa_en": 143, "hotpotqa": 96}
SHORT = [name for name in short.TASKS if name not in ("fda", "swde")]
WHOLE = [*(name for name, _ in PAPER[::2]), *(f"longbench_{task}" for task in LONGBENCH), *SHORT]


CHOICES = {"piqa": 2, "winogrande": 2, "hellaswag": 4, "arc_easy": 4, "arc_challenge": 4}
"""Task -> number of its choices; a few questions of ARC have three or five."""


class Reader(Oracle):
    """Gives the first reference that is one line."""

    def copied(self, prompt: str, doc: dict) -> str:
        return next((each for each in doc["outputs"] if "\n" not in each), doc["outputs"][0])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets come from local files, and are cached in the test's own folder."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def measure(name: str, data: Path, lm: RefineLM | None = None, **fields) -> Measured:
    policy, tokenizer = loaded()
    chosen = Setting(tokenizer=tokenizer, data=data, **{"limit": 2, **fields})
    return BENCHMARKS[name].measure(lm or RefineLM(policy, tokenizer), chosen)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), [*PAPER, *MADE])
def test_ruler_questions(name, length, shared_data):
    found = measure(name, shared_data, length=length)
    assert found.count == 2 and 0 <= found.metrics["any_match"].value <= 1
    assert found.facts["prompts"] == ("the paper's" if (name, length) in PAPER else "the harness's")
    prompts = [row["prompt"] for row in found.rows]
    assert all(prompt.rstrip().endswith("Answer:") for prompt in prompts)
    if (name, length) in MADE:
        tokens = [len(loaded()[1](prompt).input_ids) for prompt in prompts]
        assert all(length / 4 < count + ruler_qa.ANSWER_TOKENS <= length for count in tokens)


@pytest.mark.slow
def test_the_oracle_scores_100_on_the_papers_questions(shared_data):
    for name, length in PAPER:
        found = measure(name, shared_data, Oracle(*loaded()), length=length, limit=None)
        assert found.count == 200
        held = [any(each in row["prompt"] for each in row["references"]) for row in found.rows]
        assert found.metrics["any_match"].value == pytest.approx(sum(held) / 200), "yes and no stand in no document"
        assert found.metrics["any_match"].value >= (1 if name == "ruler_squadqa" else 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("task", LONGBENCH)
def test_longbench_files(task, shared_data):
    docs, tokens, facts = longbench.docs_of(Setting(tokenizer=loaded()[1], data=shared_data), task)
    assert len(docs) == LONGBENCH[task] and facts["samples in the paper"] == len(docs) - len(docs) % 8
    assert tokens == {"qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32}[task]
    assert measure(f"longbench_{task}", shared_data).count == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_short_tasks(name, shared_data):
    found = measure(name, shared_data, limit=8)
    assert found.count == 8 and set(found.metrics) >= {BENCHMARKS[name].main}
    assert found.facts["data"].endswith("local files")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"longbench_{task}" for task in LONGBENCH])
def test_the_oracle_scores_100_on_longbenchs_files(name, shared_data):
    """A reference that no line break divides scores 1; of the others only the first line counts."""
    found = measure(name, shared_data, Reader(*loaded()), limit=None)
    whole = [any("\n" not in each for each in row["references"]) for row in found.rows]
    scores = [row["score"] for row in found.rows]
    assert all(score == 1 for score, one in zip(scores, whole, strict=True) if one) and sum(whole) > 0.9 * found.count


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_the_oracle_scores_100_on_short_tasks(name, shared_data):
    found = measure(name, shared_data, Oracle(*loaded()), limit=100)
    assert found.count == (100 if name != "wikitext" else 62)
    lowest = found.metrics[BENCHMARKS[name].main]
    assert lowest.value == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_random_weights_guess(name, choices, shared_data):
    found = measure(name, shared_data, RefineLM(*loaded("new:tiny-deltanet")), limit=100)
    assert abs(found.metrics["acc"].value - 1 / choices) < 4 * math.sqrt((1 - 1 / choices) / choices / 100)


@pytest.mark.long
def test_whole_files_run_end_to_end(shared_data, tmp_path):
    lengths = tuple(sorted({length for _, length in PAPER}))
    config = EvaluationConfig(tasks=tuple(WHOLE), lengths=lengths, data=str(shared_data), device="cpu")
    began = time.monotonic()
    result = evaluate(config, tmp_path / "out")
    print(json.dumps(result["units"], indent=1), f"{time.monotonic() - began:.0f} s")
    assert [Unit(unit["task"], unit["length"]) for unit in result["units"]] == units(WHOLE, lengths)
    assert all(unit["status"] == "done" for unit in result["units"])
    counts = {unit["task"]: unit["samples"] for unit in result["units"]}
    assert counts["ruler_squadqa"] == counts["ruler_hotpotqa"] == 200
    assert {task: counts[f"longbench_{task}"] for task in LONGBENCH} == LONGBENCH
    assert counts["piqa"] == 1838 and counts["lambada_openai"] == 5153
