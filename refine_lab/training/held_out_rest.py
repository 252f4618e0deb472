"""The unseen remainder of a document: which tokens a model is adapted to, and which later tokens it must predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from refine_lab.validation import require

SHARE = 1 / 3
"""Default fraction of a document that is held out."""
LEAST = 2
"""Minimum number of tokens of either part."""
Losses = TypeVar("Losses", np.ndarray, Tensor)


@dataclass(frozen=True, kw_only=True)
class HeldOutRest:
    """A document in two parts: the model is adapted to `tokens[:first]`, and `tokens[first:stop]` is its unseen remainder.

    The remainder is predicted with the first part as its context, in one forward pass over both. Nothing is adapted to it.
    Tokens from `stop` on, such as a question after the document, belong to neither part.
    """

    first: int
    stop: int

    def __post_init__(self) -> None:
        allowed = f"at least {LEAST}, and at most {LEAST} fewer than the document's {self.stop}"
        require(LEAST <= self.first <= self.stop - LEAST, "the number of adapted tokens", self.first, allowed)

    def adapted(self, losses: Losses) -> Losses:
        """Returns the entries of the adapted part. `losses` [T - 1]: of each token of the reading but the first."""
        return losses[: self.first - 1]

    def rest(self, losses: Losses) -> Losses:
        """Returns the entries of the remainder, [stop - first].

        `losses` [T - 1]: of each token of the reading but the first. Raises ConfigError if the losses end too early.
        """
        require(len(losses) >= self.stop - 1, "the losses of a reading", len(losses), f"at least {self.stop - 1}")
        return losses[self.first - 1 : self.stop - 1]


def hold_out(tokens: int, share: float = SHARE) -> HeldOutRest:
    """Holds out the last `share` of a document of `tokens` tokens, rounded to whole tokens.

    Raises ConfigError for a share that is not between 0 and 1, and for a document so short, or a share so close to an
    end, that either part has fewer than two tokens.
    """
    require(0 < share < 1, "the held-out share", share, "above 0 and below 1")
    rest = round(tokens * share)
    enough = min(rest, tokens - rest) >= LEAST
    allowed = (
        f"enough for {LEAST} tokens in each part; the held-out share {share:.0%} leaves {tokens - rest} and {rest}"
    )
    require(enough, "a document's tokens", tokens, allowed)
    return HeldOutRest(first=tokens - rest, stop=tokens)
