"""How much context a model can use effectively: RULER's effective length and NoLiMa's criterion."""

from __future__ import annotations

from collections.abc import Mapping

RULER_THRESHOLD = 0.856
"""Score of Llama2-7B at 4,096 tokens, which RULER (Hsieh et al., 2024) requires at every effective length."""
NOLIMA_SHARE = 0.85
"""Fraction of the score at the shortest length that NoLiMa (Modarressi et al., 2025) requires."""


def effective_length(scores: Mapping[int, float], threshold: float = RULER_THRESHOLD) -> int | None:
    """Returns the largest length up to which every score is at least `threshold`; None if the first is below it."""
    longest = None
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        longest = length
    return longest


def nolima_length(scores: Mapping[int, float], share: float = NOLIMA_SHARE) -> int | None:
    """Returns the largest length up to which every score is at least `share` times the score at the shortest length.

    None if the score at the shortest length is 0, since the ratio is then undefined.
    """
    if not scores or scores[min(scores)] <= 0:
        return None
    return effective_length(scores, share * scores[min(scores)])
