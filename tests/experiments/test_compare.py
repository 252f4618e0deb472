"""Means, intervals and paired differences of methods over prompts and over seeds, by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from refine_lab.experiments.compare import comparison, per_prompt
from refine_lab.training.answers import side_by_side
from tests.support.compared import ANSWERS, PER_SEED, answers_of
from tests.support.refusals import refused


def test_means_and_intervals_by_hand():
    """Students t with 2 degrees of freedom is 4.302653 at 97.5 %."""
    table = comparison(per_prompt(ANSWERS)).set_index(["method", "measure"])
    assert set(table["count"]) == {3}
    assert per_prompt(ANSWERS).query("method == 'sft'")["contains_answer"].tolist() == [0.0, 0.5, 1.0]
    half = 4.302653 * 0.5 / math.sqrt(3)
    found = tuple(table.loc[("sft", "contains_answer"), ["mean", "std", "low", "high"]])
    assert found == pytest.approx((0.5, 0.5, 0.5 - half, 0.5 + half), abs=1e-6)
    assert "exact_match" not in set(table.index.get_level_values("measure"))  # no prompt has it
    lone = comparison(per_prompt(answers_of({"none": [[1]]}))).iloc[0]
    assert (
        (lone["measure"], lone["mean"]) == ("contains_answer", 1.0)
        and math.isnan(lone["low"])
        and math.isnan(lone["std"])
    )


def test_only_prompts_that_every_way_answered_are_compared():
    some = pd.concat([ANSWERS, answers_of({"sft": [[1, 1, 1, 1]]}).tail(1)], ignore_index=True)
    assert set(comparison(per_prompt(some))["count"]) == {3}


def test_mean_and_spread_over_seeds_in_the_order_the_methods_come():
    with refused("rows", ["sft"], "at most one for each method and seed"):
        comparison(pd.concat([PER_SEED, PER_SEED.iloc[:1]]))
    table = comparison(PER_SEED)
    assert table["method"].tolist() == ["sft", "nested"] and table["count"].tolist() == [3, 3]
    assert table["mean"].tolist() == pytest.approx([0.6, 0.75])
    assert table["std"].tolist() == pytest.approx([0.1, 0.15])


def test_answers_that_differ_come_first():
    table = side_by_side(ANSWERS, 2)
    assert list(table) == ["question", "references", "none", "sft", "refine"]
    assert table["question"].tolist() == ["q0", "q1"]
    assert table.loc[1, ["none", "sft", "refine"]].tolist() == ["no", "sft", "refine"]
    assert table.loc[0, "references"] == "x | y"
