"""The metrics that colour a document by the difference of two models, on one fixed scale."""

from __future__ import annotations

from refine_lab.explore.side_by_side import ReadingPair
from widgets.parts.token_document import Metric, Target

SCALE = 1.0
"""Default end of the colour scale, in nats: the same for every metric and document, so that colours are comparable."""
TITLES = {"logprob": "Log p", "entropy": "Entropy", "long_short": "Long-short difference"}


def pair_metrics(pair: ReadingPair, scale: float = SCALE) -> list[Metric]:
    """Returns the difference B minus A of each token, coloured from -`scale` to `scale` nats, and log p under both."""
    found = [
        Metric(f"{name}_change", f"{TITLES[name]}: B − A", "nats", values, diverging=True, low=-scale, high=scale)
        for name, values in pair.changes().items()
    ]
    both = {"a": pair.a, "b": pair.b}
    return found + [Metric(f"logprob_{x}", f"Log p: {x.upper()}", "nats", both[x].logprobs, low=-10, high=0) for x in both]


def key_targets(pair: ReadingPair) -> list[Target]:
    """Returns a mark for every key token of LongPPL."""
    return [Target(token, "key token") for token in pair.key_tokens.nonzero()[0].tolist()]
