"""Tables of scores of several methods with known effects of seeds and items."""

from __future__ import annotations

import numpy as np
import pandas as pd


def crossed(
    rng: np.random.Generator, seeds: int, items: int, *, seed: float = 0.0, item: float = 0.0, residual: float = 0.0
) -> np.ndarray:
    """Differences with mean 0 and these standard deviations of the effects of seeds, of items, and of the rest, [S, I]."""
    own, shared = rng.normal(0, seed, (seeds, 1)), rng.normal(0, item, (1, items))
    return own + shared + rng.normal(0, residual, (seeds, items))


def scores_of(methods: dict[str, np.ndarray]) -> pd.DataFrame:
    """Method -> its scores, [seeds, items]."""
    rows = [
        (method, seed, f"q{item}", float(value))
        for method, scores in methods.items()
        for (seed, item), value in np.ndenumerate(scores)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "item", "score"])
