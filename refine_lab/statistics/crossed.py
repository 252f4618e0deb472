"""Means over seeds crossed with items: components of variance, Student's t over seeds, and the two-way bootstrap.

The model is y[s, i] = mean + seed[s] + item[i] + residual[s, i], with independent effects (crossed random effects).
The variance of the mean of S x I values is var(seed) / S + var(item) / I + var(residual) / (S I). Student's t over seeds
contains no var(item): its interval is for other seeds with these very items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from refine_lab.statistics.estimate import Estimate, undetermined
from refine_lab.statistics.means import varies
from refine_lab.validation import require

RESAMPLES = 4_000
"""Number of bootstrap samples, which gives a standard error within about 1 % of its limit."""
AT_ONCE = 2**22
"""Maximum number of weights of items that are in memory together."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Components of variance of a score, or of a difference of scores."""

    seed: float
    "Variance of the effects of seeds."
    item: float = 0.0
    "Variance of the effects of items."
    residual: float = 0.0
    "Variance of what neither seed nor item explains, which includes their interaction."

    def estimate(self, value: float, seeds: int, items: int) -> Estimate:
        """Returns a mean of seeds x items with the standard error that these components give."""
        squares = (self.residual + items * self.seed, self.residual + seeds * self.item, self.residual)
        variance = self.seed / seeds + self.item / items + self.residual / (seeds * items)
        return Estimate(value=value, stderr=variance**0.5, df=satterthwaite(variance, squares, seeds, items))


def satterthwaite(variance: float, squares: tuple[float, float, float], seeds: int, items: int) -> float:
    """Returns the degrees of freedom of the variance of a mean of seeds x items (Satterthwaite, 1946).

    `squares` are the mean squares of seeds, items and residuals.
    """
    degrees = (seeds - 1, items - 1, (seeds - 1) * (items - 1))
    below = sum(square**2 / df for square, df in zip(squares, degrees, strict=True))
    return (variance * seeds * items) ** 2 / below if below > 0 else float(seeds - 1)


def linearised(cells: Float[np.ndarray, "S I"], sizes: Int[np.ndarray, "I"]) -> Float[np.ndarray, "S I"]:
    """Returns values whose plain mean, and its variance, are those of the mean weighted by the sizes of the items.

    `cells` are means over the `sizes` scores of each item. The weighted mean is a ratio, since its denominator depends
    on the items drawn; these are its values to first order. With equal sizes they are the cells themselves.
    """
    value = float(np.average(cells.mean(0), weights=sizes))
    return value + (cells - value) * (sizes / sizes.mean())


def over_seeds(values: Float[np.ndarray, "S I"]) -> Estimate:
    """Returns the mean with its standard error over seeds, by Student's t; the items count as fixed."""
    means, mean = values.mean(1), float(values.mean())
    if not varies(means, float(np.abs(values).max())):
        return undetermined(mean)
    return Estimate(value=mean, stderr=float(means.std(ddof=1)) / len(means) ** 0.5, df=float(len(means) - 1))


def spread_of(values: Float[np.ndarray, "S I"]) -> Spread:
    """Returns the components of variance by the analysis of variance; those below 0 are set to 0.

    Raises ConfigError for fewer than two seeds or items.
    """
    require(min(values.shape) >= 2, "values", values.shape, "at least two seeds and two items")
    (seeds, items), (own, shared, rest) = values.shape, _effects(values)
    residual = float((rest**2).sum()) / ((seeds - 1) * (items - 1))
    return Spread(
        seed=max(0.0, float(own.var(ddof=1)) - residual / items),
        item=max(0.0, float(shared.var(ddof=1)) - residual / seeds),
        residual=residual,
    )


def two_way(values: Float[np.ndarray, "S I"], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Returns the mean with its standard error over seeds and items, by a two-way bootstrap.

    A bootstrap sample draws S seeds and I items, each with replacement, and takes the values at which they cross (the
    pigeonhole bootstrap; Owen, 2007). On the values themselves this would count var(residual) three times and the
    variances over seeds and items (S - 1) / S and (I - 1) / I times. The effects are therefore scaled first, so that each
    contributes its unbiased component (`spread_of`). The degrees of freedom are Satterthwaite's.

    The standard error is NaN for fewer than two seeds or items and for values that are all equal.
    """
    mean = float(values.mean())
    if min(values.shape) < 2 or not varies(values.ravel()):
        return undetermined(mean)
    (seeds, items), spread, effects = values.shape, spread_of(values), _effects(values)
    components = (spread.seed, spread.item, spread.residual)
    scaled = [_scaled(part, variance) for part, variance in zip(effects, components, strict=True)]
    drawn = resampled_means(mean + scaled[0][:, None] + scaled[1] + scaled[2], resamples, seed)
    squares = (items * float(effects[0].var(ddof=1)), seeds * float(effects[1].var(ddof=1)), spread.residual)
    variance = float(drawn.var(ddof=1))
    return Estimate(value=mean, stderr=variance**0.5, df=satterthwaite(variance, squares, seeds, items))


def resampled_means(values: Float[np.ndarray, "S I"], resamples: int, seed: int) -> Float[np.ndarray, "R"]:
    """Returns the means of pigeonhole bootstrap samples: seeds and items are drawn with replacement, independently."""
    generator, (seeds, items) = np.random.default_rng(seed), values.shape
    means = []
    for start in range(0, resamples, step := max(1, AT_ONCE // items)):
        count = min(step, resamples - start)
        own = draws(generator, seeds, count)
        shared = draws(generator, items, count)
        means.append(((own @ values) * shared).sum(1) / (seeds * items))
    return np.concatenate(means)


def draws(generator: np.random.Generator, n: int, resamples: int) -> Float[np.ndarray, "R n"]:
    """Returns how often each of n units is drawn in each bootstrap sample of size n."""
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)


def _effects(
    values: Float[np.ndarray, "S I"],
) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "I"], Float[np.ndarray, "S I"]]:
    """Returns the effects of seeds and items, and the residuals."""
    own, shared = values.mean(1) - values.mean(), values.mean(0) - values.mean()
    return own, shared, values - values.mean() - own[:, None] - shared


def _scaled(effects: np.ndarray, variance: float) -> np.ndarray:
    """Returns effects with this mean square."""
    square = float((effects**2).mean())
    return effects * (variance / square) ** 0.5 if square > 0 else effects
