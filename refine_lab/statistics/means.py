"""Means and paired differences over seeds or prompts, with confidence intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Shaped
from scipy import stats

from refine_lab.method.advantages import ROUNDING
from refine_lab.validation import require

CONFIDENCE = 0.95
"""Confidence level of every interval."""


def paired_difference(
    rows: pd.DataFrame, method: str, against: str, measure: str, *, pair: str = "seed"
) -> dict[str, float]:
    """Returns the mean of `method` minus `against` over pairs with the same seed, with its 95 % interval by Student's t.

    Returns `difference`, `low`, `high`, `pairs`; low and high are NaN as in `mean_interval`. Raises ValueError if the
    two do not have the same seeds, each once.
    """
    one, other = (rows[rows["method"] == name].set_index(pair)[measure] for name in (method, against))
    matched = len(one) > 0 and one.index.is_unique and sorted(one.index) == sorted(other.index)
    allowed = f"those of {against!r}, {sorted(other.index)}, each once"
    require(matched, f"the {pair}s of {method!r}", sorted(one.index), allowed)
    scale = float(np.abs([*one, *other]).max())
    difference, low, high = mean_interval((one - other.loc[one.index]).to_numpy(), scale)
    return {"difference": difference, "low": low, "high": high, "pairs": len(one)}


def mean_interval(values: Shaped[np.ndarray, "n"], scale: float | None = None) -> tuple[float, float, float]:
    """Returns the mean of independent values, and its 95 % interval by Student's t.

    Both ends are NaN for fewer than two values and for values that are equal within rounding (see `varies`): a spread
    of 0 does not bound the next value.
    """
    n, half, varied = len(values), float("nan"), varies(values, scale)
    values = values.astype(float)
    mean = float(values.mean()) if n else float("nan")
    if varied:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def varies(values: Shaped[np.ndarray, "n"], scale: float | None = None) -> bool:
    """Returns whether values differ by more than rounding: max - min > 4 eps `scale`, with the eps of their dtype.

    `scale` is the magnitude of the numbers that were rounded, which for differences is that of their operands; None
    means the largest magnitude among the values.
    """
    if len(values) < 2:
        return False
    eps = np.finfo(values.dtype if values.dtype.kind == "f" else float).eps
    values = values.astype(float)
    largest = float(np.abs(values).max()) if scale is None else scale
    return bool(np.ptp(values) > ROUNDING * eps * largest)
