"""Holm's correction of p-values for the number of comparisons."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from refine_lab.validation import require


def holm(p_values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Returns corrected p-values: rejecting those below alpha keeps the family-wise error rate at alpha (Holm, 1979).

    The smallest p-value is multiplied by n, the next by n - 1, and so on; none is below that of a smaller p-value or
    above 1. NaN stays NaN and is not counted. Raises ConfigError for a number outside [0, 1].
    """
    known = np.flatnonzero(~np.isnan(p_values))
    values, adjusted = p_values[known], np.full(len(p_values), np.nan)
    outside = values[(values < 0) | (values > 1)]
    require(len(outside) == 0, "a p-value", outside[0] if len(outside) else None, "from 0 to 1")
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    adjusted[known[order]] = np.minimum(1, np.maximum.accumulate(values[order] * factors))
    return adjusted
