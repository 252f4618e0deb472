"""Intervals over seeds and items for the differences in the paper's tables, where every sample was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from refine_lab.experiments.paper_rows import EVERY_SEED
from refine_lab.statistics import compare_methods

BySeed = Mapping[int, pd.DataFrame | None]
"""Seed -> the item and score of every sample, or None where they were not recorded."""
ONE, OTHER = "one", "other"
NONE: dict[str, Any] = {"low": float("nan"), "high": float("nan"), "items": 0}


def shared_seeds(one: Mapping[int, Any], other: Mapping[int, Any]) -> list[int]:
    """Returns the seeds that both have; a measurement of every seed counts as one of each."""
    seeds = sorted({*one, *other} - {EVERY_SEED}) or [EVERY_SEED]
    return [seed for seed in seeds if all(seed in each or EVERY_SEED in each for each in (one, other))]


def of_seed(values: Mapping[int, Any], seed: int) -> Any:
    """Returns the value of a seed, or that of every seed."""
    return values[seed] if seed in values else values[EVERY_SEED]


def scores_over(lengths: Sequence[Any]) -> pd.DataFrame | None:
    """Returns the scores at several lengths together; None unless all have equally many, so that their mean is the same.

    Anything but a frame counts as not recorded, since pandas stores None as NaN in some columns.
    """
    frames = [each for each in lengths if isinstance(each, pd.DataFrame)]
    if not frames or len(frames) < len(lengths) or len({len(each) for each in frames}) > 1:
        return None
    return pd.concat(frames, ignore_index=True)


def difference_interval(one: BySeed, other: BySeed) -> dict[str, Any]:
    """Returns the 95 % interval of the mean difference over seeds and items as `low` and `high`, and the number of `items`.

    It is that of `refine_lab.statistics.compare_methods`. Both ends are NaN, and the number is 0, where the scores of a
    seed were not recorded or are of other items than those of another; the ends alone are NaN for fewer than two seeds or
    items, and for differences that do not vary.
    """
    seeds = shared_seeds(one, other)
    tables = [
        (method, seed, of_seed(values, seed)) for method, values in ((ONE, one), (OTHER, other)) for seed in seeds
    ]
    found = [scores.assign(method=method, seed=seed) for method, seed, scores in tables if scores is not None]
    if not found or len(found) < len(tables):
        return NONE
    first, *rest = (scores["item"].value_counts() for scores in found)
    if not all(first.sort_index().equals(each.sort_index()) for each in rest):
        return NONE
    (row,) = compare_methods(pd.concat(found, ignore_index=True), [(ONE, OTHER)]).to_dict("records")
    return {name: row[name] for name in NONE}
