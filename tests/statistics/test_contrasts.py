"""Comparisons of methods: pairs, Holm's correction, equivalence, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from refine_lab.statistics import compare_methods, difference_spread, holm
from refine_lab.statistics.contrasts import paired_cells
from tests.factories.comparisons import scores_of
from tests.support.refusals import naming, refused

RNG = np.random.default_rng(0)
DIFFICULTY = RNG.normal(0, 3, (1, 40))
SCORES = scores_of(
    {
        "sft": DIFFICULTY + RNG.normal(0, 1, (4, 40)),
        "placebo": DIFFICULTY + RNG.normal(0, 1, (4, 40)),
        "refine": DIFFICULTY + 2 + RNG.normal(0, 1, (4, 40)),
    }
)


def test_holm_by_hand():
    """Holm (1979): 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, none below an earlier one: 0.04, 0.06, 0.06, 0.06."""
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.6, np.nan, 0.01])) == pytest.approx([0.6, np.nan, 0.02], nan_ok=True)
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    with refused("a p-value", 1.5, "from 0 to 1"):
        holm(np.array([0.1, 1.5]))


def test_pairs_cancel_the_difficulty_of_items():
    table = compare_methods(SCORES, margin=0.5).set_index(["method", "against"])
    assert list(table.index) == [("placebo", "sft"), ("refine", "sft"), ("refine", "placebo")]
    means = SCORES.groupby("method")["score"].mean()
    row = table.loc[("refine", "sft")]
    assert row["difference"] == pytest.approx(means["refine"] - means["sft"])
    assert 1.5 < row["low"] < 2 < row["high"] < 2.4  # the deviation of an item's difficulty alone is 3
    assert (row["seeds"], row["items"], row["prompts"]) == (4, 40, 40)
    assert row["p_holm"] < 0.01 and not row["equivalent"]
    placebo = table.loc[("placebo", "sft")]
    assert placebo["low"] < 0 < placebo["high"] and placebo["equivalent"] and placebo["p_equivalence"] < 0.05
    assert placebo["p_holm"] == pytest.approx(placebo["p"])  # the largest of three
    assert difference_spread(SCORES, "refine", "sft").residual == pytest.approx(2, rel=0.3)


def test_pairs_are_of_the_same_seed_and_item_not_of_the_same_place():
    turned = SCORES.sample(frac=1, random_state=0)
    pairs = [("refine", "sft")]
    pd.testing.assert_frame_equal(compare_methods(turned, pairs), compare_methods(SCORES, pairs))


def test_the_correction_counts_the_comparisons_asked_for():
    one = compare_methods(SCORES, [("placebo", "sft")])
    assert one["p_holm"].tolist() == one["p"].tolist()


def test_a_question_asked_in_several_prompts_is_one_item():
    twice = pd.concat([SCORES, SCORES[SCORES["item"] == "q0"].assign(score=0.0)], ignore_index=True)
    cells, sizes = paired_cells(twice, "refine", "sft")
    single, _ = paired_cells(SCORES, "refine", "sft")
    assert cells.shape == (4, 40) and sizes.tolist() == [2, *[1] * 39]
    assert cells[:, 0] == pytest.approx(single[:, 0] / 2)
    row = compare_methods(twice, [("refine", "sft")]).iloc[0]
    assert (row["items"], row["prompts"]) == (40, 41)
    assert row["difference"] == pytest.approx(single.sum() / 4 / 41)


def test_unequal_or_missing_pairs_are_refused():
    pair = [("refine", "sft")]
    last = (SCORES["method"] == "refine") & (SCORES["seed"] == 3)
    with refused("the seeds of 'refine'", [0, 1, 2], "those of 'sft', [0, 1, 2, 3]"):
        compare_methods(SCORES[~last], pair)
    with naming(ValueError, "'refine'", "seed 3", "'q7'", "must be 1", "got 0"):
        compare_methods(SCORES[~(last & (SCORES["item"] == "q7"))], pair)
    with naming(ValueError, "'refine'", "seed 3", "'q7'", "must be 1", "got 2"):
        compare_methods(pd.concat([SCORES, SCORES[last & (SCORES["item"] == "q7")]]), pair)
    with refused("the score of 'refine' at seed 3"):
        compare_methods(SCORES.assign(score=SCORES["score"].mask(last)), pair)
    with naming(ValueError, "unknown method 'refin'", "did you mean 'refine'?"):
        compare_methods(SCORES, [("refin", "sft")])
    with refused("method", "sft", "a method other than 'sft'"):
        compare_methods(SCORES, [("sft", "sft")])
    with refused("columns"):
        compare_methods(SCORES.drop(columns="item"), pair)
    with refused("rows", 0):
        compare_methods(SCORES[:0])
    with refused("methods", ["sft"], "at least two"):
        compare_methods(SCORES[SCORES["method"] == "sft"])
