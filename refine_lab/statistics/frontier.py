"""Frontiers of two measures over a grid of coefficients, and whether one method's frontier lies above another's.

A coefficient buys a benefit (recall) at a cost (next-token loss). The frontier of a method is the best benefit at each
cost. Two frontiers are compared by their mean difference at equal cost over the costs that both cover, as rate-distortion
curves are (Bjøntegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001), here with linear
interpolation, which cannot overshoot the few points of a grid.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from refine_lab.statistics.contrasts import check_columns
from refine_lab.statistics.crossed import draws
from refine_lab.statistics.estimate import Estimate, undetermined
from refine_lab.statistics.means import varies
from refine_lab.validation import ConfigError, require, unknown

RESAMPLES = 1_000
FEWEST = 0.9
"""Minimum fraction of bootstrap samples in which the cost ranges of the two frontiers must overlap."""


class Frontier(NamedTuple):
    """The points of a method that no other of its points beats, by increasing cost, and the costs that it covers."""

    cost: Float[np.ndarray, "n"]
    benefit: Float[np.ndarray, "n"]
    most: float
    "Largest cost of any point of the method; the frontier is flat from the cost of its best benefit up to this one."

    def at(self, cost: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
        """Returns the benefit at costs from the smallest one on, by linear interpolation."""
        return np.interp(cost, self.cost, self.benefit)


def frontier(cost: Float[np.ndarray, "n"], benefit: Float[np.ndarray, "n"]) -> Frontier:
    """Returns the frontier of points with a cost (lower is better) and a benefit (higher is better)."""
    order = np.lexsort((-benefit, cost))
    cost, benefit = cost[order], benefit[order]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], benefit[:-1]]))
    kept = benefit > best
    return Frontier(cost=cost[kept], benefit=benefit[kept], most=float(cost[-1]))


def gap(one: Frontier, other: Frontier) -> tuple[float, float]:
    """Returns the mean of `one` minus `other` over the costs that both cover, and the fraction of them at which it is above 0.

    The integral of the piecewise linear difference is exact. Both are NaN if no range of costs is covered by both.
    """
    low, high = max(one.cost[0], other.cost[0]), min(one.most, other.most)
    if not low < high:
        return float("nan"), float("nan")
    knots = np.unique(np.clip(np.concatenate([[low, high], one.cost, other.cost]), low, high))
    difference = one.at(knots) - other.at(knots)
    widths, (left, right) = np.diff(knots), (difference[:-1], difference[1:])
    steepness = np.abs(left) + np.abs(right)
    positive = np.clip(left, 0, None) + np.clip(right, 0, None)
    above = np.divide(positive, steepness, out=np.zeros_like(widths), where=steepness > 0)
    mean = float(widths @ (left + right)) / 2
    return mean / float(high - low), float(widths @ above) / float(high - low)


def method_frontier(rows: pd.DataFrame, method: str, *, benefit: str, cost: str) -> Frontier:
    """Returns the frontier of the means of each coefficient of a method; `rows` as for `compare_frontiers`."""
    check_columns(rows, ("method", "coefficient", benefit, cost))
    own = _of(rows, method)
    means = own.groupby("coefficient")[[cost, benefit]].mean()
    return frontier(means[cost].to_numpy(float), means[benefit].to_numpy(float))


def compare_frontiers(
    rows: pd.DataFrame,
    method: str,
    against: str,
    *,
    benefit: str = "exact_recall",
    cost: str = "ntp_loss",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Returns whether the frontier of `method` lies above that of `against`, by a bootstrap over seeds.

    `rows` has `method`, `coefficient`, `seed` and the two measures, a row for each coefficient and seed; with a column
    `item`, a row for each item too, and items are then drawn as well (the pigeonhole bootstrap, which is conservative). A
    sample draws the same seeds and items for both methods and all coefficients, and its frontiers are those of its means.
    Returns `difference`, the mean over the costs that both cover; `low` and `high`, its 95 % interval by Student's t with
    S - 1 degrees of freedom from the standard deviation of the samples times sqrt(S / (S - 1)); `p`; `above`, the fraction of
    the costs at which `method` is ahead on the means; and `seeds`. An interval that is above 0 says that the frontier is
    higher on average; `above` below 1 says that the frontiers cross.

    Raises ConfigError if the seeds or items of a coefficient differ from those of the others, and if the frontiers have
    no range of costs in common.
    """
    names = ["coefficient", "seed", *(["item"] if "item" in rows else [])]
    check_columns(rows, ("method", *names, benefit, cost))
    grids = {name: _grid(_of(rows, name), name, names, (cost, benefit)) for name in (method, against)}
    (one, seeds), (other, expected) = grids[method], grids[against]
    for name, own, wanted in zip(("seeds", "items"), seeds, expected, strict=True):
        require(own == wanted, f"the {name} of {method!r}", own, f"those of {against!r}, {wanted}")
    value, above = _gap_of(one.mean((2, 3)), other.mean((2, 3)))
    if np.isnan(value):
        means = {name: grid[0].mean((1, 2)) for name, (grid, _) in grids.items()}
        ranges = [f"{name!r} from {each.min():.4g} to {each.max():.4g}" for name, each in means.items()]
        sentence = f"the frontiers must have a range of {cost} in common, got {' and '.join(ranges)}"
        raise ConfigError(cost, ranges, "a range in common", sentence)
    samples = _resampled(one, other, resamples, seed)
    known = samples[~np.isnan(samples)]
    allowed = f"at least {FEWEST:.0%} of {resamples}"
    require(
        len(known) >= FEWEST * resamples, f"bootstrap samples with a range of {cost} in common", len(known), allowed
    )
    scale = max(float(np.abs(grid[1]).max()) for grid in (one, other))
    estimate = _estimate(value, known, len(seeds[0]), scale)
    low, high = estimate.interval()
    return {
        "difference": value,
        "low": low,
        "high": high,
        "p": estimate.p_value,
        "above": above,
        "seeds": len(seeds[0]),
    }


def _of(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    own = rows[rows["method"] == method]
    if own.empty:
        raise unknown("method", method, map(str, dict.fromkeys(rows["method"])))
    return own


def _grid(
    own: pd.DataFrame, method: str, names: list[str], measures: tuple[str, str]
) -> tuple[Float[np.ndarray, "2 C S I"], tuple[list, list]]:
    """Returns cost and benefit of each coefficient, seed and item (one item if there are none), and the two axes' names."""
    place = f"rows of {method!r}"
    repeated = own.loc[own.duplicated(names), names].to_dict("records")
    require(not repeated, place, repeated[:1], f"one for each {', '.join(names)}")
    wrong = own.loc[own[[*measures]].isna().any(axis=1), names].to_dict("records")
    require(not wrong, place, wrong[:1], f"rows with {' and '.join(measures)}")
    if "item" not in own:
        own = own.assign(item=0)
    axes = [sorted(own[name].unique().tolist()) for name in ("coefficient", "seed", "item")]
    full = pd.MultiIndex.from_product(axes, names=["coefficient", "seed", "item"])
    table = own.set_index([*full.names])[[*measures]].reindex(full)
    gaps = table[table.isna().any(axis=1)].reset_index()[names].to_dict("records")
    require(not gaps, f"the combinations without a row of {method!r}", gaps[:1], "none")
    shape = (2, *map(len, axes))
    return table.to_numpy(float).T.reshape(shape), (axes[1], axes[2])


def _gap_of(one: Float[np.ndarray, "2 C"], other: Float[np.ndarray, "2 D"]) -> tuple[float, float]:
    return gap(frontier(*one), frontier(*other))


def _resampled(
    one: Float[np.ndarray, "2 C S I"], other: Float[np.ndarray, "2 D S I"], resamples: int, seed: int
) -> Float[np.ndarray, "R"]:
    """Returns the difference in bootstrap samples of seeds and items; NaN without costs in common."""
    generator, (seeds, items) = np.random.default_rng(seed), one.shape[2:]
    own, shared = draws(generator, seeds, resamples) / seeds, draws(generator, items, resamples) / items
    means = [np.einsum("rs,mcsi,ri->rmc", own, grid, shared, optimize=True) for grid in (one, other)]
    return np.array([_gap_of(*pair)[0] for pair in zip(*means, strict=True)])


def _estimate(value: float, samples: Float[np.ndarray, "R"], seeds: int, scale: float) -> Estimate:
    if seeds < 2 or not varies(samples, scale):
        return undetermined(value)
    stderr = float(samples.std(ddof=1)) * (seeds / (seeds - 1)) ** 0.5
    return Estimate(value=value, stderr=stderr, df=float(seeds - 1))
