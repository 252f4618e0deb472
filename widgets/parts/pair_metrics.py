"""The metrics that colour a document by the difference of two models, on one fixed scale."""

from __future__ import annotations

import numpy as np

from refine_lab.explore.side_by_side import ReadingPair
from widgets.parts.token_document import Metric

SCALE = 1.0
"""Default end of the colour scale, in nats: the same for every metric and document, so that colours are comparable."""
TITLES = {"logprob": "Log p", "entropy": "Entropy", "long_short": "Long-short difference"}


def pair_metrics(pair: ReadingPair, scale: float = SCALE) -> list[Metric]:
    """Returns the difference B minus A of each token, coloured from -`scale` to `scale` nats, and log p under both.

    If there are key tokens, another metric has the difference in log p at these alone, which LongPPL averages.
    """
    changes = pair.changes()
    named = {name: (f"{TITLES[name]}: B − A", values) for name, values in changes.items()}
    if pair.key_tokens.any():
        named["key"] = ("Log p at key tokens: B − A", np.where(pair.key_tokens, changes["logprob"], np.nan))
    found = [
        Metric(f"{name}_change", title, "nats", values, diverging=True, low=-scale, high=scale)
        for name, (title, values) in named.items()
    ]
    both = {"a": pair.a, "b": pair.b}
    return found + [
        Metric(f"logprob_{x}", f"Log p: {x.upper()}", "nats", both[x].logprobs, low=-10, high=0) for x in both
    ]
