"""The result card that an evaluation leaves in the run that it evaluated."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation import run as evaluation
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.run import evaluate, located
from refine_lab.experiments.compare import evaluation_results
from refine_lab.models.hub import SHIPPED
from refine_lab.runs.cards import read_cards
from refine_lab.runs.run import Run
from tests.factories.evaluation import write_longbench
from tests.factories.run_monitor import write_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with one checkpoint."""
    run = write_run(tmp_path / "runs", 0)
    shutil.copytree(SHIPPED / "tiny-deltanet", run.path / "checkpoints" / "step-4")
    return run


@pytest.fixture
def config(run: Run, tmp_path: Path) -> EvaluationConfig:
    write_longbench(tmp_path / "data", rows=4)
    tasks = ("longbench_hotpotqa", "longbench_trec")
    return EvaluationConfig(model=str(run.path), tasks=tasks, limit=3, data=str(tmp_path / "data"), device="cpu")


def silent(line: str) -> None:
    pass


def test_a_card_has_figures_counts_versions_and_the_place_of_the_results(run, config, tmp_path):
    result = evaluate(config, tmp_path / "out" / "first", silent)
    (card,) = read_cards(run.path)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(card["date"])).total_seconds() < 600
    assert (card["step"], card["answers"], card["ttt"], card["limit"], card["seed"]) == (4, "greedy", "none", 3, 0)
    full = run.path / card["results"] / "results.json"
    assert json.loads(full.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert not Path(card["results"]).is_absolute()
    assert card["versions"]["lm_eval"] == "0.4.13" and card["versions"]["torch"] == result["environment"]["torch"]
    done, gap = card["tasks"]
    score = result["units"][0]["metrics"]["score"]
    assert (done["value"], done["stderr"]) == (score["value"], score["stderr"])
    assert (done["samples"], done["different_samples"], done["metric"]) == (3, 3, "score")
    assert gap["status"] == "missing" and "trec" in gap["reason"] and "value" not in gap


def test_every_evaluation_of_a_run_has_one_card(run, config, tmp_path):
    evaluate(config, tmp_path / "first", silent)
    evaluate(replace(config, sampled=True), tmp_path / "second", silent)
    checkpoint = str(run.path / "checkpoints" / "step-4")
    evaluate(replace(config, model=checkpoint), tmp_path / "other" / "first", silent)
    write_longbench(tmp_path / "data", "trec", rows=4)
    evaluate(config, tmp_path / "first", silent)
    cards = read_cards(run.path)
    assert sorted(card["results"] for card in cards) == ["../../first", "../../other/first", "../../second"]
    assert [len(card["tasks"]) for card in cards] == [2] * 3
    states = {card["results"]: card["tasks"][1]["status"] for card in cards}
    assert states == {"../../first": "done", "../../second": "missing", "../../other/first": "missing"}
    table = evaluation_results([run])
    assert len(table) == 6 and set(table["step"]) == {"4"} and set(table["answers"]) == {"greedy", "sampled"}
    assert table["value ± standard error"].str.startswith("not measured: ").sum() == 2


@pytest.mark.parametrize("model", ["tiny-deltanet", "new:{run}"])
def test_a_model_that_no_run_has_trained_has_no_card(run, config, tmp_path, model):
    evaluate(replace(config, model=model.format(run=run.path)), tmp_path / "out", silent)
    assert not (run.path / "evaluations").exists()


def test_a_run_that_cannot_be_written_is_evaluated_without_a_card(run, config, tmp_path):
    (run.path / "evaluations").write_text("in the way", encoding="utf-8")
    said: list[str] = []
    result = evaluate(config, tmp_path / "out", said.append)
    assert result["units"][0]["status"] == "done" and (tmp_path / "out" / "results.json").is_file()
    (sentence,) = [line for line in said if "result card" in line]
    assert sentence.startswith("The result card") and str(run.path) in sentence and "\n" not in sentence


def test_an_evaluation_keeps_to_the_checkpoint_that_it_began_with(run, config, tmp_path, monkeypatch):
    names: list[str] = []

    def located_before_another_step(*arguments):
        found = located(*arguments)
        shutil.copytree(SHIPPED / "tiny-deltanet", run.path / "checkpoints" / "step-8")
        return found

    def loaded(name, **settings):
        names.append(Path(name).name)
        return RefineLM(name, **settings)

    monkeypatch.setattr(evaluation, "located", located_before_another_step)
    monkeypatch.setattr(evaluation, "RefineLM", loaded)
    evaluate(config, tmp_path / "out", silent)
    assert names == ["step-4"] and read_cards(run.path)[0]["step"] == 4
