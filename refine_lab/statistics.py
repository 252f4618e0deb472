"""What several seeds say: mean and spread of each way, and paired differences between two with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from refine_lab.config import require

CONFIDENCE = 0.95
"""Of every interval."""


def by_way(rows: pd.DataFrame, measures: Sequence[str], ways: Sequence[str] = ("way",)) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over seeds of each measure: a row a way, in the order they come.

    `rows` has a row a way and seed: the columns `ways`, `seed` and the measures. Columns: `ways`, `seeds`, `<measure>` and
    `<measure>_std`, which is NaN for one seed.
    """
    parts = []
    for values, group in rows.groupby(list(ways), sort=False):
        row = dict(zip(ways, values, strict=True)) | {"seeds": len(group)}
        for measure in measures:
            row |= {measure: group[measure].mean(), f"{measure}_std": group[measure].std(ddof=1)}
        parts.append(row)
    return pd.DataFrame(parts)


def paired_difference(
    rows: pd.DataFrame, way: str, against: str, measure: str, *, column: str = "way", pair: str = "seed"
) -> dict[str, float]:
    """Mean of `way` minus `against` over pairs of the same seed, with its 95 % interval by Student's t.

    Returns `difference`, `low`, `high`, `pairs`; low and high are NaN for a single pair. Raises ValueError where the two do
    not have the same seeds, each once.
    """
    one, other = (rows[rows[column] == name].set_index(pair)[measure] for name in (way, against))
    unique = one.index.is_unique and other.index.is_unique
    matched = len(one) > 0 and unique and set(one.index) == set(other.index)
    require(
        matched, f"the {pair}s of {way!r}", sorted(one.index), f"those of {against!r}, {sorted(other.index)}, each once"
    )
    differences = one - other.loc[one.index]
    mean, pairs = float(differences.mean()), len(differences)
    if pairs == 1:
        return {"difference": mean, "low": float("nan"), "high": float("nan"), "pairs": pairs}
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1) * differences.std(ddof=1) / pairs**0.5)
    return {"difference": mean, "low": mean - half, "high": mean + half, "pairs": pairs}
