"""Experiment 7: the registered runs of post-training, their items, and their section of the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.evidence_page import page
from benchmarks.evidence_posttrain import KIND, METHODS, PostRun, questions_asked, runs, train_and_answer
from refine_lab.experiments.evidence import record
from refine_lab.runs.run import list_runs
from tests.support.paths import TEXT


def test_every_registered_run_is_the_recipe_with_other_prompts():
    found = runs()
    assert len({run.key for run in found}) == len(found) == 18
    for run in found[: len(METHODS)]:
        assert run.config.method == run.method and run.config.task.source == f"recall:{KIND}"
        assert (run.config.recipe, run.config.steps) == ("posttrain", 25)


def test_prompts_with_the_same_question_are_one_item():
    asked = questions_asked()
    assert len(asked) == 200 > len(set(asked)) > 30


def test_the_page_has_right_answers_and_differences(tmp_path):
    for seed in (0, 1):
        for method, right in (("nested_sft", 0.5), ("nested_expected", 0.75)):
            items = {"answers": [float(number < 200 * right + 5 * seed) for number in range(200)]}
            record(tmp_path, PostRun(method=method, seed=seed), {"exact_recall": right}, items, commit="abc", seconds=1)
    lines = page(tmp_path).splitlines()
    assert "4 of 18 registered runs have finished." in lines and "0 of 120 registered rows have been measured." in lines
    assert "| nested SFT | 2 | 50.0 ± 0.0 |" in lines and "| nested expected match | 2 | 75.0 ± 0.0 |" in lines
    (contrast,) = [line for line in lines if line.startswith("| nested expected match – nested SFT | +25.0 (")]
    cells = [cell.strip() for cell in contrast.split("|")[2:-1]]
    assert cells[1:3] == ["2", str(len(set(questions_asked())))]
    assert cells[3] == "< 0.001" and cells[4] == "1.000", "it is above zero, and not within the margin"


@pytest.mark.slow
def test_a_run_is_trained_and_answers_once(tmp_path):
    config = PostRun(method="nested_expected", seed=0).config
    task = replace(config.task, train=16, validation=0, test=3)
    config = replace(config, steps=1, task=task, data=replace(config.data, sources={str(TEXT): 1.0}))
    answers, loss = train_and_answer(config, tmp_path)
    assert len(answers) == 3 and set(answers["method"]) == {"nested_expected"} and 1 < loss < 8
    (run,) = list_runs(tmp_path)
    assert [path.name for path in (run.path / "answers").iterdir()] == ["test"], (
        "not those of the model before training"
    )
    again, _ = train_and_answer(config, tmp_path)
    assert again.equals(answers) and len(list_runs(tmp_path)) == 1
