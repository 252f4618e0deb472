"""Paired differences between methods over seeds and items, with intervals, Holm's correction and equivalence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from refine_lab.statistics.crossed import RESAMPLES, Spread, linearised, over_seeds, spread_of, two_way
from refine_lab.statistics.holm import holm
from refine_lab.statistics.power import ALPHA
from refine_lab.validation import ConfigError, require, unknown

SCORE_COLUMNS = ("method", "seed", "item", "score")
"""Columns of a table of scores; an item that was asked in several prompts has several rows for a method and seed."""


def compare_methods(
    scores: pd.DataFrame,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    margin: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns a row for each pair (method, against) with the paired difference of their mean scores.

    `scores` has the columns `SCORE_COLUMNS`. Without `pairs` every method is compared with every earlier one. Columns:
    `method`, `against`, `difference`; `low` and `high`, the 95 % interval over seeds and items (`two_way`), with its
    p-value `p` and `p_holm`, corrected for the number of rows; `seeds_low` and `seeds_high`, the interval by Student's t
    over seeds; the counts `seeds`, `items` (distinct items) and `prompts` (per seed). With `margin` also
    `p_equivalence` (TOST, from the two-way standard error) and `equivalent`, whether it is below 0.05. The margin is in
    the unit of the scores and has to be chosen before they are seen.

    Raises ConfigError for methods without the same seeds and the same number of scores of each item.
    """
    check_columns(scores, SCORE_COLUMNS)
    methods = [*dict.fromkeys(scores["method"])]
    pairs = [(later, first) for first, later in combinations(methods, 2)] if pairs is None else list(pairs)
    require(len(pairs) > 0, "methods", methods, "at least two")
    rows = [_contrast(scores, *pair, margin, resamples, seed) for pair in pairs]
    table = pd.DataFrame(rows)
    table.insert(list(table).index("p") + 1, "p_holm", holm(table["p"].to_numpy(float)))
    return table


def difference_spread(scores: pd.DataFrame, method: str, against: str) -> Spread:
    """Returns the components of variance of the paired difference, for `power` and `seeds_needed`.

    Raises ConfigError as `paired_cells`, and for fewer than two seeds or items.
    """
    return spread_of(linearised(*paired_cells(scores, method, against)))


def paired_cells(
    scores: pd.DataFrame, method: str, against: str
) -> tuple[Float[np.ndarray, "S I"], Int[np.ndarray, "I"]]:
    """Returns the differences of two methods, one for each seed and item, and the number of scores of each item.

    A difference is that of the means over the scores of the item. Raises ConfigError, which names the first difference,
    if the two methods do not have the same seeds, or a different number of scores for an item at any seed, and for a
    score that is NaN.
    """
    check_columns(scores, SCORE_COLUMNS)
    require(method != against, "method", method, f"a method other than {against!r}")
    (one, counts), (other, others) = (_cells(scores, name) for name in (method, against))
    seeds, allowed = sorted(one.index), f"those of {against!r}, {sorted(other.index)}"
    require(seeds == sorted(other.index), f"the seeds of {method!r}", seeds, allowed)
    expected = others.iloc[0]
    for name, found in ((against, others), (method, counts)):
        for own, row in found.iterrows():
            both = row.to_frame("found").join(expected.rename("wanted"), how="outer").fillna(0).astype(int)
            wrong = both[both["found"] != both["wanted"]]
            if len(wrong):
                item, (number, wanted) = wrong.index[0], wrong.iloc[0]
                place = f"the number of scores of {name!r} at seed {own} for the item {item!r}"
                raise ConfigError(place, int(number), f"{wanted}, as of {against!r} at seed {expected.name}")
    cells = (one - other.loc[one.index, one.columns]).to_numpy(float)
    return cells, expected.loc[one.columns].to_numpy(int)


def check_columns(rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raises ConfigError for a table that lacks a column or has no rows."""
    missing = [name for name in columns if name not in rows]
    require(not missing, "columns", list(rows), f"at least {', '.join(columns)}; {missing} missing")
    require(len(rows) > 0, "rows", len(rows), "at least one")


def _cells(scores: pd.DataFrame, method: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns a method's mean score, and number of scores, of each seed (rows) and item (columns)."""
    own = scores[scores["method"] == method]
    if own.empty:
        raise unknown("method", method, map(str, dict.fromkeys(scores["method"])))
    undefined = own[own["score"].isna()]
    place = f"the score of {method!r} at seed {undefined['seed'].iloc[0]}" if len(undefined) else ""
    require(undefined.empty, place, float("nan"), "a number")
    grouped = own.assign(score=own["score"].astype(float)).groupby(["seed", "item"])["score"]
    return grouped.mean().unstack("item"), grouped.size().unstack("item", fill_value=0)


def _contrast(
    scores: pd.DataFrame, method: str, against: str, margin: float | None, resamples: int, seed: int
) -> dict[str, object]:
    cells, sizes = paired_cells(scores, method, against)
    values = linearised(cells, sizes)
    crossed, by_seed = two_way(values, resamples=resamples, seed=seed), over_seeds(values)
    (low, high), (seeds_low, seeds_high) = crossed.interval(), by_seed.interval()
    row: dict[str, object] = {
        "method": method,
        "against": against,
        "difference": crossed.value,
        "low": low,
        "high": high,
        "p": crossed.p_value,
        "seeds_low": seeds_low,
        "seeds_high": seeds_high,
        "seeds": len(cells),
        "items": len(sizes),
        "prompts": int(sizes.sum()),
    }
    if margin is not None:
        p = crossed.equivalence(margin)
        row |= {"margin": margin, "p_equivalence": p, "equivalent": p < ALPHA}
    return row
