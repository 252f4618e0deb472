"""Means, spreads and paired intervals against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from refine_lab.statistics.means import mean_interval, paired_difference, varies
from tests.support.compared import PER_SEED as ROWS
from tests.support.refusals import refused


def test_the_interval_of_a_paired_difference_by_hand():
    """Differences 0.10, 0.15, 0.20: mean 0.15, deviation 0.05, t(0.975, 2) = 4.302653 (any table)."""
    found = paired_difference(ROWS, "nested", "sft", "contains_answer")
    half = 4.302653 * 0.05 / math.sqrt(3)
    assert found == pytest.approx({"difference": 0.15, "low": 0.15 - half, "high": 0.15 + half, "pairs": 3}, rel=1e-6)


def test_pairs_are_of_the_same_seed_not_of_the_same_place():
    turned = ROWS.iloc[::-1].reset_index(drop=True)
    assert paired_difference(turned, "nested", "sft", "contains_answer") == pytest.approx(
        paired_difference(ROWS, "nested", "sft", "contains_answer")
    )


def test_a_single_pair_has_no_interval():
    found = paired_difference(ROWS[ROWS["seed"] == 0], "nested", "sft", "contains_answer")
    assert found["difference"] == pytest.approx(0.1) and math.isnan(found["low"]) and math.isnan(found["high"])


@pytest.mark.parametrize("rows", [ROWS[:-1], pd.concat([ROWS, ROWS[:1]]), ROWS[ROWS["method"] == "sft"]])
def test_seeds_that_do_not_match_are_refused(rows):
    with refused("the seeds of 'nested'"):
        paired_difference(rows, "nested", "sft", "contains_answer")


def test_equal_values_make_no_claim():
    mean, low, high = mean_interval(np.array([0.25, 0.25, 0.25]))
    assert mean == 0.25 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_differences_that_are_equal_but_for_rounding_make_no_claim(dtype):
    """Both seeds gain 0.2; a float32 column holds the differences 0.20000002 and 0.19999999."""
    rows = pd.DataFrame([("sft", 0, 0.4), ("sft", 1, 0.3), ("nested", 0, 0.6), ("nested", 1, 0.5)])
    rows = rows.set_axis(["method", "seed", "contains_answer"], axis=1).astype({"contains_answer": dtype})
    found = paired_difference(rows, "nested", "sft", "contains_answer")
    assert found["difference"] == pytest.approx(0.2)
    assert math.isnan(found["low"]) and math.isnan(found["high"])


@pytest.mark.parametrize("scale", [1e-13, 1.0, 1e13])
def test_an_interval_does_not_depend_on_the_unit(scale):
    expected = mean_interval(np.array([0.10, 0.15, 0.20]))
    assert mean_interval(scale * np.array([0.10, 0.15, 0.20])) == pytest.approx([scale * x for x in expected])


def test_values_vary_where_they_differ_by_more_than_rounding():
    near = np.array([1.0, 1.0 + 2**-23], dtype=np.float32)
    assert not varies(near) and varies(near.astype(float)) and not varies(near.astype(float), scale=1e9)
    assert not varies(near[:1]) and not varies(np.zeros(3)) and varies(np.array([0, 1]))
