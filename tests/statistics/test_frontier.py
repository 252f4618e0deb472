"""Frontiers of recall and loss on curves with known answers, and their test over seeds."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from refine_lab.statistics import compare_frontiers, method_frontier
from refine_lab.statistics.frontier import frontier, gap
from tests.support.refusals import naming, refused


def rows_of(seeds: int = 4, noise: float = 0.0, items: int = 0, shift: float = 0.1) -> pd.DataFrame:
    """`b` is a line from (1, 0) to (3, 1) with a dominated point, `a` is `shift` above it at coefficients of its own."""
    rng, rows = np.random.default_rng(0), []
    costs = {"a": {0.1: 1.2, 1.0: 2.0, 3.0: 2.8}, "b": {0.3: 1.0, 1.0: 2.0, 2.0: 3.0}}
    for method, grid in costs.items():
        for coefficient, cost in grid.items():
            for seed in range(seeds):
                own = rng.normal(0, noise)
                for item in range(items or 1):
                    benefit = (cost - 1) / 2 + shift * (method == "a") + own + rng.normal(0, noise) * bool(items)
                    rows.append((method, coefficient, seed, item, benefit, cost))
    rows += [("b", 9.0, seed, item, -1.0, 2.5) for seed in range(seeds) for item in range(items or 1)]
    frame = pd.DataFrame(rows, columns=["method", "coefficient", "seed", "item", "exact_recall", "ntp_loss"])
    return frame if items else frame.drop(columns="item")


def test_dominated_points_are_not_on_the_frontier():
    found = frontier(np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([5.0, 1.0, 0.5, 3.0, 4.0]))
    assert found.cost.tolist() == [1, 2, 3] and found.benefit.tolist() == [1, 3, 5] and found.most == 4
    assert found.at(np.array([1.5, 2.5, 4.0])).tolist() == [2, 4, 5]
    assert method_frontier(rows_of(), "b", benefit="exact_recall", cost="ntp_loss").cost.tolist() == [1, 2, 3]


def test_the_mean_difference_at_equal_cost_by_hand():
    line, other = (
        frontier(np.array([0.0, 2.0]), np.array([0.0, 2.0])),
        frontier(np.array([1.0, 4.0]), np.array([0.5, 0.5])),
    )
    assert other.cost.tolist() == [1] and other.most == 4
    mean, above = gap(line, other)  # between costs 1 and 2: 0.5 to 1.5
    assert (mean, above) == pytest.approx((1.0, 1.0))
    crossing = frontier(np.array([0.0, 2.0]), np.array([1.0, 1.5]))  # the line is below it up to 4 / 3
    mean, above = gap(line, crossing)
    assert (mean, above) == pytest.approx(((0 + 2) / 2 - (1 + 1.5) / 2, (2 - 4 / 3) / 2))
    assert all(map(math.isnan, gap(line, frontier(np.array([2.0, 3.0]), np.array([1.0, 2.0])))))
    assert gap(line, line) == (0.0, 0.0)


def test_parallel_frontiers_differ_by_their_distance_and_without_noise_there_is_no_interval():
    found = compare_frontiers(rows_of(), "a", "b", resamples=50)
    assert found["difference"] == pytest.approx(0.1) and found["above"] == pytest.approx(1) and found["seeds"] == 4
    assert math.isnan(found["low"]) and math.isnan(found["p"])
    back = compare_frontiers(rows_of(), "b", "a", resamples=50)
    assert back["difference"] == pytest.approx(-0.1) and back["above"] == pytest.approx(0)


@pytest.mark.parametrize("items", [0, 30])
def test_the_test_finds_a_difference_beyond_noise_and_none_within(items):
    noise = 0.02 if not items else 0.05
    found = compare_frontiers(rows_of(5, noise, items, shift=0.15), "a", "b", resamples=300)
    assert 0 < found["low"] < 0.15 < found["high"] and found["p"] < 0.05
    none = compare_frontiers(rows_of(5, noise, items, shift=0.0), "a", "b", resamples=300)
    assert none["low"] < 0 < none["high"] and none["p"] > 0.05
    again = compare_frontiers(rows_of(5, noise, items, shift=0.0), "a", "b", resamples=300)
    assert again == none != compare_frontiers(rows_of(5, noise, items, shift=0.0), "a", "b", resamples=300, seed=1)


def test_coverage_of_the_interval_over_seeds():
    """Of 120 simulated grids whose true difference is 0.1; the error of a coverage of 95 % is 2 points."""
    rng, covered, quiet = np.random.default_rng(3), 0, rows_of(5)
    for _ in range(120):
        noisy = quiet.assign(exact_recall=quiet["exact_recall"] + rng.normal(0, 0.02, len(quiet)))
        found = compare_frontiers(noisy, "a", "b", resamples=60)
        covered += found["low"] <= 0.1 <= found["high"]
    assert 0.9 <= covered / 120 <= 0.99


def test_incomplete_grids_and_frontiers_without_common_costs_are_refused():
    rows = rows_of()
    with naming(ValueError, "must be none", "'coefficient': 0.1", "'seed': 2", "'a'"):
        compare_frontiers(rows[~((rows["method"] == "a") & (rows["seed"] == 2) & (rows["ntp_loss"] < 1.5))], "a", "b")
    with refused("the seeds of 'a'", [0, 1, 2], "those of 'b', [0, 1, 2, 3]"):
        compare_frontiers(rows[~((rows["method"] == "a") & (rows["seed"] == 3))], "a", "b")
    with refused("rows of 'a'"):
        compare_frontiers(pd.concat([rows, rows[:1]]), "a", "b")
    with refused("rows of 'a'"):
        compare_frontiers(rows.assign(exact_recall=rows["exact_recall"].where(rows.index > 0)), "a", "b")
    far = rows.assign(ntp_loss=rows["ntp_loss"] + 10 * (rows["method"] == "a"))
    with naming(ValueError, "a range of ntp_loss in common", "'a' from 11.2 to 12.8", "'b' from 1 to 3"):
        compare_frontiers(far, "a", "b")
    with naming(ValueError, "unknown method 'c'"):
        compare_frontiers(rows, "c", "b")
