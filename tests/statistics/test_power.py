"""Power and numbers of seeds against a table, a simulation, and what the items alone allow."""

from __future__ import annotations

import numpy as np
import pytest

from refine_lab.statistics import Spread, power, seeds_needed
from refine_lab.statistics.crossed import over_seeds, spread_of, two_way
from tests.factories.comparisons import crossed
from tests.support.refusals import refused


def test_the_paired_t_test_of_a_table():
    """Effect sizes 0.5, 0.8 and 1 need 34, 15 and 10 pairs for a power of 80 % at 5 % (G*Power, two-sided)."""
    spread = Spread(seed=4.0)
    assert [seeds_needed(2 * effect, spread) for effect in (0.5, 0.8, 1.0)] == [34, 15, 10]
    assert power(2 * 0.5, spread, 34) == pytest.approx(0.8078, abs=1e-3)
    assert power(0.0, spread, 5) == pytest.approx(0.05)
    assert power(1.0, spread, 8, 50) == pytest.approx(power(-1.0, spread, 8, 7))


def test_power_over_seeds_against_simulation():
    rng, seeds = np.random.default_rng(0), 6
    found = np.mean([over_seeds(1.5 + crossed(rng, seeds, 1, seed=1)).p_value < 0.05 for _ in range(2_000)])
    assert power(1.5, Spread(seed=1.0), seeds) == pytest.approx(found, abs=0.03)


def test_power_over_seeds_and_items_against_simulation():
    rng, spread = np.random.default_rng(1), Spread(seed=0.04, item=0.25, residual=1.0)
    deviations = {"seed": 0.2, "item": 0.5, "residual": 1.0}
    found = np.mean(
        [two_way(0.4 + crossed(rng, 6, 60, **deviations), resamples=200).p_value < 0.05 for _ in range(600)]
    )
    assert power(0.4, spread, 6, 60) == pytest.approx(found, abs=0.06)


def test_seeds_cannot_replace_items():
    """With 40 items the standard error never falls below sqrt(1 / 40) = 0.158, and 2.8 of them are needed for 80 %."""
    spread = Spread(seed=0.01, item=1.0, residual=0.5)
    assert seeds_needed(0.4, spread, 40) is None
    enough = seeds_needed(0.4, spread, 400)
    assert enough is not None and power(0.4, spread, enough, 400) >= 0.8 > power(
        0.4, spread, max(2, enough - 1), 400
    ) - (enough == 2)
    observed = spread_of(crossed(np.random.default_rng(2), 5, 40, seed=0.3, residual=1.0))
    assert seeds_needed(0.1, observed, 40) > seeds_needed(0.5, observed, 40) >= 2


def test_bad_values_are_refused():
    spread = Spread(seed=1.0)
    for call, name in (
        (lambda: power(1.0, spread, 1), "seeds"),
        (lambda: power(1.0, spread, 2, 1), "items"),
        (lambda: power(1.0, Spread(seed=0.0), 3), "spread"),
        (lambda: seeds_needed(0.0, spread), "difference"),
        (lambda: seeds_needed(1.0, spread, target=0.04), "target"),
    ):
        with refused(name):
            call()
