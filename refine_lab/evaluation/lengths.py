"""How long a context a model makes use of: RULER's effective length, and the rule of NoLiMa."""

from __future__ import annotations

from collections.abc import Mapping

RULER_THRESHOLD = 0.856
"""Score of Llama2-7B at 4,096 tokens, which RULER (Hsieh et al., 2024) asks for at every effective length."""
NOLIMA_SHARE = 0.85
"""Share of the score at the shortest length that NoLiMa (Modarressi et al., 2025) asks for."""


def effective_length(scores: Mapping[int, float], threshold: float = RULER_THRESHOLD) -> int | None:
    """Returns the largest length up to which every score is at least `threshold`; None if the first is below it."""
    longest = None
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        longest = length
    return longest


def nolima_length(scores: Mapping[int, float], share: float = NOLIMA_SHARE) -> int | None:
    """Returns the largest length whose score, and all before it, have at least `share` of the score at the shortest.

    None if the score at the shortest length is 0, of which every score has any share.
    """
    if not scores or scores[min(scores)] <= 0:
        return None
    return effective_length(scores, share * scores[min(scores)])
