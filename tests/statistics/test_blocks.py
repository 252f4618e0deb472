"""The block bootstrap: values by hand, the choice of the block length, coverage on autocorrelated series, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refine_lab.statistics.blocks import best_block_length, block_bootstrap
from tests.support.refusals import refused

SERIES = 400
RESAMPLES = 400


def autoregressive(phi: float, length: int, count: int, seed: int = 1) -> np.ndarray:
    """Rows of x[t] = phi x[t - 1] + noise, with mean 0, after 200 steps that are left out."""
    noise = np.random.default_rng(seed).standard_normal((count, length + 200))
    rows = np.zeros_like(noise)
    for t in range(1, length + 200):
        rows[:, t] = phi * rows[:, t - 1] + noise[:, t]
    return rows[:, 200:]


def test_the_standard_error_by_hand() -> None:
    """Six values in blocks of two: the six circular blocks have the sums 1, 5, 9, 13, 11, 3, and a sample has three."""
    values = np.array([0.0, 1.0, 4.0, 5.0, 8.0, 3.0])
    sums = np.array([1.0, 5.0, 9.0, 13.0, 11.0, 3.0])
    found = block_bootstrap(values, block_length=2, resamples=40_000)
    expected = math.sqrt(3 * sums.var() / 6**2 * 6 / (6 - 2))
    assert found.value == 3.5 and found.df == 2 and found.count == 6
    assert found.stderr == pytest.approx(expected, rel=0.02)


def test_a_last_block_is_shorter() -> None:
    """Five values in blocks of two: two blocks of two, and a single value."""
    values = np.array([0.0, 1.0, 4.0, 5.0, 8.0])
    pairs = np.array([1.0, 5.0, 9.0, 13.0, 8.0])
    found = block_bootstrap(values, block_length=2, resamples=40_000)
    assert found.stderr == pytest.approx(math.sqrt((2 * pairs.var() + values.var()) / 25 * 5 / 3), rel=0.02)


def test_blocks_of_one_value_give_the_standard_error_of_independent_values() -> None:
    values = np.random.default_rng(0).standard_normal(300)
    found = block_bootstrap(values, block_length=1, resamples=20_000)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(300), rel=0.02)


def test_the_seed_decides_and_draws_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = autoregressive(0.5, 200, 1)[0]
    one, same, other = (block_bootstrap(values, seed=seed).stderr for seed in (3, 3, 4))
    assert one == same != other
    monkeypatch.setattr("refine_lab.statistics.blocks.AT_ONCE", 1000)
    assert block_bootstrap(values, seed=3).stderr == pytest.approx(one, rel=1e-12)


def test_a_longer_memory_needs_longer_blocks() -> None:
    lengths = [np.mean([best_block_length(row) for row in autoregressive(phi, 1000, 60)]) for phi in (0.0, 0.5, 0.8)]
    assert lengths[0] < 3 and 8 < lengths[1] < 20 and 1.5 * lengths[1] < lengths[2]


def test_the_block_length_by_the_formula() -> None:
    """Alternating values of an average of two: R(1) / R(0) is about 1/2, R(k) is about 0 beyond, so that M is 2."""
    noise = np.random.default_rng(5).standard_normal(20_001)
    values = noise[1:] + noise[:-1]
    covariances = [
        float((values - values.mean())[: 20_000 - k] @ (values - values.mean())[k:]) / 20_000 for k in (0, 1)
    ]
    bias, variance = 2 * covariances[1], 4 / 3 * (covariances[0] + 2 * covariances[1]) ** 2
    assert best_block_length(values) == round((2 * bias**2 / variance * 20_000) ** (1 / 3))


@pytest.mark.parametrize(("phi", "length"), [(0.0, 60), (0.5, 500), (0.8, 1000)])
def test_the_interval_covers_the_mean_of_an_autoregressive_series(phi: float, length: int) -> None:
    """In 95 % of series, up to the known shortfall of short blocks; single values cover far too seldom."""
    rows = autoregressive(phi, length, SERIES)
    covered = {None: 0, 1: 0}
    for row in rows:
        for blocks in covered:
            low, high = block_bootstrap(row, block_length=blocks, resamples=RESAMPLES).interval()
            covered[blocks] += low <= 0 <= high
    assert 0.90 <= covered[None] / SERIES <= 0.98
    assert (covered[1] / SERIES < 0.8) == (phi > 0)


def test_values_that_determine_no_interval() -> None:
    for values in (np.array([1.5]), np.full(9, 0.1), np.zeros(40)):
        found = block_bootstrap(values)
        assert found.value == pytest.approx(values[0]) and found.block_length == 1
        assert math.isnan(found.stderr) and all(map(math.isnan, found.interval()))


def test_refusals() -> None:
    with refused("values", "3 values, 1 of them not finite"):
        block_bootstrap(np.array([1.0, np.nan, 2.0]))
    with refused("values", "0 values, 0 of them not finite"):
        block_bootstrap(np.zeros(0))
    for length in (0, 6):
        with refused("block_length", length, "from 1 to 5 for 10 values"):
            block_bootstrap(np.arange(10.0), block_length=length)
