"""Intervals over seeds and items: components of variance, the bootstrap, and coverage on simulated random effects."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest

from refine_lab.statistics.crossed import linearised, over_seeds, resampled_means, spread_of, two_way
from refine_lab.statistics.estimate import Estimate
from tests.factories.comparisons import crossed
from tests.support.refusals import refused

VALUES = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 2.0]])
"""Mean 3; effects of seeds 0, 0; of items -1, 0, 1; residuals -1, -1, 2 and 1, 1, -2."""


def test_components_by_hand():
    """The mean squares are 0 over seeds, 4 / 2 = 2 over items and 12 / 2 = 6 over residuals: both effects are below 0."""
    assert astuple(spread_of(VALUES)) == pytest.approx((0, 0, 6))
    additive = np.array([[0.0, 2.0], [1.0, 3.0], [5.0, 7.0]])  # item effects -1, 1: variance 2; seeds 1, 2, 6: 7
    assert astuple(spread_of(additive)) == pytest.approx((7, 2, 0))
    with refused("values", (1, 3), "at least two seeds and two items"):
        spread_of(VALUES[:1])


def test_the_bootstrap_has_the_variance_of_the_components():
    """var(seed) / S + var(item) / I + var(residual) / (S I), within the error of 40,000 samples."""
    values = 5 + crossed(np.random.default_rng(0), 4, 30, seed=2, item=2, residual=3)
    spread = spread_of(values)
    assert min(spread.seed, spread.item) > 0
    found, expected = two_way(values, resamples=40_000), spread.estimate(values.mean(), 4, 30)
    assert found.value == expected.value == values.mean()
    assert found.stderr == pytest.approx(expected.stderr, rel=0.02)
    assert found.df == pytest.approx(expected.df, rel=0.1)
    assert two_way(values).stderr == two_way(values).stderr != two_way(values, seed=1).stderr


def test_a_pigeonhole_sample_draws_seeds_and_items_independently():
    """The effects of seeds and items and the residuals contribute mean(effect**2) / n each (Owen, 2007)."""
    values = crossed(np.random.default_rng(1), 3, 5, seed=1, item=1, residual=1)
    own, shared = values.mean(1) - values.mean(), values.mean(0) - values.mean()
    rest = values - values.mean() - own[:, None] - shared
    drawn = resampled_means(values, 200_000, seed=0)
    expected = (own**2).mean() / 3 + (shared**2).mean() / 5 + (rest**2).mean() / 15
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)
    assert drawn.var() == pytest.approx(expected, rel=0.02)
    exact = {0.0, 0.5, 1.0}  # two seeds, two items: every mean of two draws of 0 and 1
    assert set(resampled_means(np.array([[0.0, 0.0], [1.0, 1.0]]), 200, seed=0)) == exact


@pytest.mark.parametrize(
    ("seeds", "items", "deviations"),
    [
        (3, 60, {"item": 1.0, "residual": 1.0}),
        (8, 44, {"item": 0.5, "residual": 1.0}),
        (4, 100, {"seed": 0.3, "item": 0.5, "residual": 1.0}),
    ],
)
def test_the_two_way_interval_covers_the_truth_where_seeds_alone_do_not(seeds, items, deviations):
    """Of 400 simulated comparisons with a true difference of 0; the error of a coverage of 95 % is 1.1 points."""
    rng = np.random.default_rng(seeds * items)
    covered = {two_way: 0, over_seeds: 0}
    for _ in range(400):
        values = crossed(rng, seeds, items, **deviations)
        for method, estimate in ((two_way, two_way(values, resamples=200)), (over_seeds, over_seeds(values))):
            low, high = estimate.interval()
            covered[method] += low <= 0 <= high
    assert 0.92 <= covered[two_way] / 400 <= 0.985
    if "seed" not in deviations:
        assert covered[over_seeds] / 400 < 0.9


def test_students_t_over_seeds_by_hand():
    """Means 1, 2, 6 over seeds: mean 3, deviation sqrt 7, t(0.975, 2) = 4.302653."""
    low, high = over_seeds(np.array([[0.0, 2.0], [1.0, 3.0], [5.0, 7.0]])).interval()
    half = 4.302653 * math.sqrt(7 / 3)
    assert (low, high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


@pytest.mark.parametrize("values", [np.full((3, 4), 0.2), np.array([[0.0, 1.0, 1.0]]), np.array([[0.0], [1.0], [0.5]])])
def test_without_spread_or_with_one_seed_or_item_there_is_no_interval(values):
    estimate = two_way(values)
    assert estimate.value == pytest.approx(values.mean())
    assert all(map(math.isnan, (*estimate.interval(), estimate.p_value, estimate.equivalence(0.1))))


def test_items_with_several_prompts_weigh_by_their_number():
    """(3 * 1 + 1 * 0) / 4 at both seeds; to first order 0.75 + 1.5 * 0.25 = 1.125 and 0.75 - 0.5 * 0.75 = 0.375."""
    values = linearised(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([3, 1]))
    assert values.tolist() == [[1.125, 0.375], [1.125, 0.375]] and values.mean() == 0.75
    cells = crossed(np.random.default_rng(0), 3, 4, residual=1)
    assert linearised(cells, np.full(4, 2)) == pytest.approx(cells)


def test_equivalence_and_significance_by_hand():
    """With 10 degrees of freedom t(0.95) = 1.812461 and t(0.975) = 2.228139."""
    estimate = Estimate(value=0.5, stderr=1.0, df=10.0)
    assert estimate.equivalence(0.5 + 1.812461) == pytest.approx(0.05, abs=1e-6)
    assert estimate.equivalence(0.4) > 0.5  # the estimate itself is outside the margin
    assert Estimate(value=-0.5, stderr=1.0, df=10.0).equivalence(2.0) == pytest.approx(estimate.equivalence(2.0))
    assert Estimate(value=2.228139, stderr=1.0, df=10.0).p_value == pytest.approx(0.05, abs=1e-6)
    assert estimate.interval(0.9) == pytest.approx((0.5 - 1.812461, 0.5 + 1.812461), abs=1e-6)
    with refused("margin", 0.0, "a number above 0"):
        estimate.equivalence(0.0)
    with refused("level", 95.0):
        estimate.interval(95.0)
