"""Power: the chance that a true difference is found, and the number of seeds needed to find it."""

from __future__ import annotations

from scipy import stats

from refine_lab.statistics.crossed import Spread
from refine_lab.validation import require

ALPHA = 0.05
"""Level of a test, two-sided."""
MOST_SEEDS = 1_000
"""Maximum number of seeds that `seeds_needed` considers."""


def power(difference: float, spread: Spread, seeds: int, items: int = 2, *, alpha: float = ALPHA) -> float:
    """Returns the chance that a two-sided test at level `alpha` finds a true difference, by the noncentral F.

    `spread` has the components of the paired difference, from `difference_spread` or `Spread(seed=std**2)` for
    differences per seed with standard deviation `std`; then `items` does not matter. Raises ConfigError for fewer than
    two seeds or items.
    """
    require(seeds >= 2, "seeds", seeds, "at least 2")
    require(items >= 2, "items", items, "at least 2")
    estimate = spread.estimate(difference, seeds, items)
    require(estimate.stderr > 0, "spread", spread, "components, at least one of them above 0")
    if difference == 0:
        return alpha  # which scipy's noncentral F does not return
    limit = stats.f.isf(alpha, 1, estimate.df)  # F = t**2: scipy's noncentral t is NaN for large shifts
    return float(stats.ncf.sf(limit, 1, estimate.df, (difference / estimate.stderr) ** 2))


def seeds_needed(
    difference: float, spread: Spread, items: int = 2, *, target: float = 0.8, alpha: float = ALPHA
) -> int | None:
    """Returns the smallest number of seeds with which `power` is at least `target`.

    Returns None if 1,000 seeds do not suffice. Since seeds leave the variance of the items as it is, only more items
    help then. Raises ConfigError for a difference of 0 and for a target outside (alpha, 1).
    """
    require(difference != 0, "difference", difference, "a number other than 0")
    require(alpha < target < 1, "target", target, f"between alpha, {alpha}, and 1")
    low, high = 1, MOST_SEEDS
    if power(difference, spread, high, items, alpha=alpha) < target:
        return None
    while high - low > 1:  # `low` is too few, `high` suffices
        middle = (low + high) // 2
        enough = power(difference, spread, middle, items, alpha=alpha) >= target
        low, high = (low, middle) if enough else (middle, high)
    return high
