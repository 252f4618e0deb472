"""Tables of scores from answers and from the files of evaluations."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from refine_lab.data.tasks.items import FEWEST_ITEMS, few_items, items_of
from refine_lab.evaluation.catalogue import Unit
from refine_lab.evaluation.results import write_unit
from refine_lab.statistics import answer_scores, compare_methods, evaluation_scores
from tests.support.compared import answers_of
from tests.support.refusals import naming

ANSWERS = answers_of({"sft": [[0, 1, 1], [0, 0, 1]], "refine": [[1, 1, 1], [1, 0, 1]]})


def test_prompts_with_the_same_question_are_one_item():
    answers = ANSWERS.assign(question=ANSWERS["question"].replace("q1", " q0 "))
    assert items_of(answers).tolist()[:3] == ["q0", "q0", "q2"]
    row = compare_methods(answer_scores(answers)).iloc[0]
    assert (row["method"], row["items"], row["prompts"], row["seeds"]) == ("refine", 2, 3, 2)
    assert row["difference"] == pytest.approx(1 / 3)
    assert items_of(answers.assign(question="")).tolist()[:3] == ["p0", "p1", "p2"]


def test_a_model_before_training_is_compared_at_every_seed():
    base = answers_of({"base": [[0, 0, 1]]}).assign(seed=-1)
    scores = answer_scores(pd.concat([base, ANSWERS], ignore_index=True))
    assert scores.groupby("method")["seed"].unique().map(sorted).tolist() == [[0, 1]] * 3
    assert compare_methods(scores, [("sft", "base")]).iloc[0]["difference"] == pytest.approx((1 / 3 + 0) / 2)


def test_measures_that_a_prompt_lacks_are_left_out():
    assert answer_scores(ANSWERS, "exact_match").empty
    assert answer_scores(ANSWERS, "loss_after")["score"].tolist()[:3] == [2.0, 1.0, 1.0]
    with naming(ValueError, "at least method, seed, question, name, rouge"):
        answer_scores(ANSWERS, "rouge")


def evaluation_in(folder: Path, scores: list[float]) -> Path:
    rows = [
        {"sample": i, "item": f"digest {i // 2}", "prompt": f"prompt {i}", "score": score, "empty_answer": 0.0}
        for i, score in enumerate(scores)
    ]
    write_unit(folder, Unit("niah_single_1", 512), {"status": "done"}, rows)
    return folder


def test_samples_of_evaluations(tmp_path):
    folders = {
        ("sft", 0): evaluation_in(tmp_path / "a", [0, 1, 1, 0]),
        ("sft", 1): evaluation_in(tmp_path / "b", [0, 0, 1, 0]),
        ("refine", 0): evaluation_in(tmp_path / "c", [1, 1, 1, 0]),
        ("refine", 1): evaluation_in(tmp_path / "d", [1, 1, 1, 0]),
    }
    row = compare_methods(evaluation_scores(folders, "niah_single_1", 512)).iloc[0]
    assert (row["items"], row["prompts"], row["seeds"], row["difference"]) == (2, 4, 2, 0.375)
    assert evaluation_scores(folders, "niah_single_1", 512, "empty_answer")["score"].eq(0).all()
    with naming(ValueError, "unknown task 'niah_single'", "did you mean 'niah_single_"):
        evaluation_scores(folders, "niah_single", 512)
    with naming(ValueError, "unknown measure of 'niah_single_1' 'f1'", "score"):
        evaluation_scores(folders, "niah_single_1", 512, "f1")
    with naming(FileNotFoundError, str(tmp_path / "a"), "samples/niah_single_1-1024.parquet"):
        evaluation_scores(folders, "niah_single_1", 1024)


def test_few_different_items_are_named():
    assert few_items(FEWEST_ITEMS) == few_items(None) == ""
    assert "only 44 distinct questions, fewer than 100" in few_items(44)
