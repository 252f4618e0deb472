"""Differences from a reference by hand: which seeds and items count, and over what an interval is taken."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from refine_lab.experiments.reference import (
    WHOLE,
    default_reference,
    differences_from,
    not_compared,
    scores_by_item,
    scores_by_seed,
)
from refine_lab.statistics import compare_methods
from tests.factories.comparisons import scores_of
from tests.support.compared import ANSWERS, PER_SEED
from tests.support.refusals import refused

NAN = float("nan")


def test_two_seeds_and_items_have_the_interval_of_the_comparison_module() -> None:
    draw = np.random.default_rng(0)
    table = scores_of(
        {name: draw.normal(size=(3, 20)) + level for name, level in (("sft", 0), ("refine", 1), ("dft", 2))}
    )
    found = differences_from(table, "sft").set_index("method")
    whole = compare_methods(table, [("refine", "sft"), ("dft", "sft")]).set_index("method")
    for name in ("difference", "low", "high", "p_holm", "seeds", "items", "prompts"):
        assert found[name].tolist() == pytest.approx(whole[name].tolist()), name
    assert set(found["over"]) == {"seeds and items"} and set(found["against"]) == {"sft"}
    assert found.loc["refine", "value"] - found.loc["refine", "against_value"] == pytest.approx(
        whole.loc["refine", "difference"]
    )


def test_one_seed_has_students_t_over_items() -> None:
    """refine - sft is 1, 0, 1, 0: mean 0.5, standard deviation 0.57735, t(0.975, 3) = 3.182446."""
    table = scores_of({"sft": np.array([[0.0, 1, 0, 1]]), "refine": np.ones((1, 4))})
    (row,) = differences_from(table, "sft").to_dict("records")
    half = 3.182446 * 0.57735 / 2
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)
    assert (row["over"], row["seeds"], row["items"]) == ("items", 1, 4)


@pytest.mark.parametrize(("seeds", "over"), [(3, "seeds"), (2, "nothing"), (1, "nothing")])
def test_scores_without_items_have_an_interval_from_three_seeds(seeds: int, over: str) -> None:
    """nested - sft is 0.1, 0.15, 0.2 at the three seeds: t(0.975, 2) = 4.302653, standard deviation 0.05."""
    table = scores_by_seed(PER_SEED[PER_SEED["seed"] < seeds], "contains_answer")
    assert set(table["item"]) == {WHOLE}
    (row,) = differences_from(table, "sft").to_dict("records")
    assert row["over"] == over
    if over == "seeds":
        half = 4.302653 * 0.05 / math.sqrt(3)
        assert (row["difference"], row["low"], row["high"]) == pytest.approx((0.15, 0.15 - half, 0.15 + half), abs=1e-6)
    else:
        assert row["difference"] == pytest.approx((0.1 + 0.15) / 2 if seeds == 2 else 0.1) and math.isnan(row["low"])


def test_only_shared_seeds_and_items_count_and_a_baseline_that_answered_once_counts_for_every_seed() -> None:
    table = scores_by_item(ANSWERS, "contains_answer")
    found = differences_from(table, "none").set_index("method")
    assert found["seeds"].to_dict() == {"sft": 2, "refine": 2}
    assert found.loc["refine", "difference"] == pytest.approx(5 / 6 - 1 / 3)
    other = table[(table["method"] != "refine") | ((table["seed"] == 1) & (table["item"] != "q0"))]
    (row,) = differences_from(other[other["method"] != "none"], "sft").to_dict("records")
    assert (row["seeds"], row["items"], row["difference"]) == (1, 2, 0.0)
    apart = table.assign(seed=table["seed"] + 10 * (table["method"] == "refine"))
    assert "refine" not in set(differences_from(apart, "sft")["method"])


def test_repeated_runs_of_a_seed_are_averaged() -> None:
    rows = [("sft", 0, 1.0), ("sft", 1, 2.0), ("refine", 0, 3.0), ("refine", 0, 5.0), ("refine", 1, 4.0)]
    table = scores_by_seed(pd.DataFrame(rows, columns=["method", "seed", "loss"]), "loss")
    (row,) = differences_from(table, "sft").to_dict("records")
    assert (row["seeds"], row["value"], row["difference"]) == (2, 4.0, 2.5)
    again = ANSWERS[ANSWERS["method"] == "refine"].assign(contains_answer=0.0)
    table = scores_by_item(pd.concat([ANSWERS, again]), "contains_answer")
    row = differences_from(table, "sft").set_index("method").loc["refine"]
    assert (row["seeds"], row["items"], row["value"]) == (2, 3, pytest.approx(5 / 12))


def test_why_a_method_is_not_compared() -> None:
    table = scores_by_item(ANSWERS, "contains_answer")
    refine = table["method"] == "refine"
    cases = {"seed": table.assign(seed=table["seed"] + 10 * refine)}
    cases["question"] = table.assign(item=table["item"].where(~refine, "other " + table["item"]))
    cases["count"] = pd.concat([table, table[refine]])
    for lacks, scores in cases.items():
        assert not_compared(scores, "sft") == {"refine": lacks}
        assert "refine" not in set(differences_from(scores, "sft")["method"])
    assert not_compared(table, "sft") == {}


def test_a_model_before_training_is_compared_at_every_seed() -> None:
    rows = [("base", None, 1.0), *(("sft", seed, 2.0 + seed) for seed in (0, 1, 2))]
    table = scores_by_seed(pd.DataFrame(rows, columns=["method", "seed", "loss"]), "loss")
    (row,) = differences_from(table, "base").to_dict("records")
    assert (row["seeds"], row["difference"], row["over"]) == (3, 2.0, "seeds")


def test_the_reference() -> None:
    assert default_reference(["base", "refine", "sft"]) == "sft"
    assert default_reference(["base", "sft", "nested_sft", "nested_refine"]) == "nested_sft"
    assert default_reference(["refine: lr 0.1", "sft: lr 0.1", "sft: lr 0.2"]) == "sft: lr 0.1"
    assert default_reference(["refine", "dft"]) == "refine"
    with refused("reference", "dft", "sft, nested"):
        differences_from(scores_by_seed(PER_SEED, "contains_answer"), "dft")
