"""Means, intervals and paired differences of methods over prompts and over seeds, by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from refine_lab.experiments.compare import comparison, differences, per_prompt
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


def test_paired_differences_by_hand():
    """refine - sft prompt by prompt: 1, 0, 0."""
    found = differences(per_prompt(ANSWERS)).set_index(["method", "against", "measure"])
    row = found.loc[("refine", "sft", "contains_answer")]
    half = 4.302653 * math.sqrt(1 / 3) / math.sqrt(3)
    expected = (1 / 3, 1 / 3 - half, 1 / 3 + half, 3)
    assert tuple(row[["difference", "low", "high", "pairs"]]) == pytest.approx(expected, abs=1e-6)
    assert set(found.index.droplevel(2)) == {("sft", "none"), ("refine", "none"), ("refine", "sft")}
    assert "exact_match" not in set(found.index.get_level_values(2))  # no prompt has it


def test_only_prompts_that_every_way_answered_are_compared():
    some = pd.concat([ANSWERS, answers_of({"sft": [[1, 1, 1, 1]]}).tail(1)], ignore_index=True)
    assert set(comparison(per_prompt(some))["count"]) == {3}


def test_a_prompt_whose_measure_one_method_lost_is_compared_in_none():
    some = ANSWERS.copy()
    some.loc[(some["method"] == "none") & (some["name"] == "p0"), "loss_after"] = math.nan
    found = differences(per_prompt(some)).set_index(["method", "against", "measure"])
    assert found.loc[("refine", "sft", "loss_after"), "pairs"] == 2
    assert found.loc[("refine", "sft", "contains_answer"), "pairs"] == 3


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
