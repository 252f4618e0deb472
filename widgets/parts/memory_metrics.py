"""The metrics that colour a document by its writes to the memory, and lists of tokens as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import numpy as np
from jaxtyping import Float

from refine_lab.explore.attribution import Cell, WriteAttribution
from refine_lab.validation import require
from widgets.parts.token_document import Metric

MOST_COLOURED = 99.9
"""Percentile of the effects at which their colours end: few writes have a large effect."""
_RANGE = re.compile(r"(\d{1,9})(?:\s*[-\u2013]\s*(\d{1,9}))?")


def attribution_metrics(
    attribution: WriteAttribution, tokens: int, cells: Collection[Cell] | None, earlier: WriteAttribution | None = None
) -> list[Metric]:
    """Returns the effect of each token's write in the given heads; tokens after the target's position have no value.

    The fraction that the gates have left is included if a gate has forgotten anything, and the change of the effect
    since `earlier`, an attribution of the same target under other weights.
    """
    effects, signed = attribution.by_token(cells), attribution.signed(cells)
    name = "contrast" if attribution.target.against else "log p"
    high, most = _high(effects), _high(np.abs(signed))
    signs = f"lowers {name}", f"raises {name}"
    title = "Signed effect of the write"
    span = {"low": -most, "high": most, "ends": signs}
    metrics = [
        Metric("signed", title, "nats", padded(signed, tokens), diverging=True, **span),
        Metric("effect", "Size of the effect of the write", "nats", padded(effects, tokens), low=0, high=high),
    ]
    if (left := _retained(attribution, cells)) is not None:
        title = "Fraction of the write left by the gates"
        metrics.append(Metric("retained", title, "", padded(left, tokens), low=0, high=1))
    if earlier is not None:
        change = padded(effects - earlier.by_token(cells), tokens)
        title = "Change in the effect since the weights changed"
        metrics.append(Metric("effect_change", title, "nats", change, diverging=True))
    return metrics


def loss_change_metric(before: Float[np.ndarray, "T"], after: Float[np.ndarray, "T"]) -> Metric:
    """Returns by how much erasing changes the next-token loss of each token."""
    return Metric("loss_change", "Change in NTP loss without the erased writes", "nats", after - before, diverging=True)


def padded(values: Float[np.ndarray, "S"], tokens: int) -> Float[np.ndarray, "T"]:
    """Returns the values of the first tokens of a document, with NaN for the others."""
    return np.append(values, np.full(tokens - len(values), np.nan))


def _high(values: Float[np.ndarray, "S"]) -> float:
    high = float(np.percentile(values, MOST_COLOURED)) if len(values) else 0.0
    return high if high > 0 else 1.0


def _retained(attribution: WriteAttribution, cells: Collection[Cell] | None) -> Float[np.ndarray, "S"] | None:
    """Returns the mean fraction left in the given heads, or None if the gates have left everything."""
    rows = [
        attribution.retained[m, h]
        for m, part in enumerate(attribution.parts)
        for h in range(part.heads)
        if cells is None or (part.layer, part.name, h) in cells
    ]
    if not rows or all((row == 1).all() for row in rows):
        return None
    return np.mean(rows, axis=0)


# -- lists of tokens -----------------------------------------------------------------------------------------------------


def tokens_in(text: str, tokens: int) -> tuple[int, ...]:
    """Returns the tokens of a list such as `646-648, 805`, ascending. Raises ValueError for any other text."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RANGE.fullmatch(part)
        require(match is not None, "the tokens to erase", text, "numbers and ranges, such as 646-648, 805")
        assert match is not None
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last < tokens, "a range of tokens", part, f"from 0 to {tokens - 1}, the smaller number first")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def listed(tokens: Iterable[int]) -> str:
    """Returns tokens as a list that `tokens_in` reads."""
    runs: list[list[int]] = []
    for token in sorted(set(tokens)):
        if runs and token == runs[-1][1] + 1:
            runs[-1][1] = token
        else:
            runs.append([token, token])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def heads_named(cells: Collection[Cell] | None) -> str:
    """Returns which heads are meant, for a sentence."""
    if cells is None:
        return "all heads"
    names = [f"layer {layer} {'state' if name == 'recurrent_state' else name} head {h}" for layer, name, h in cells]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
