"""Which tokens are adapted to, and which are the unseen remainder: values by hand, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refine_lab.training.held_out_rest import HeldOutRest, hold_out
from tests.support.refusals import refused


@pytest.mark.parametrize(
    ("tokens", "share", "first"), [(9, 1 / 3, 6), (10, 1 / 3, 7), (1000, 0.33, 670), (4, 0.5, 2), (100, 0.9, 10)]
)
def test_the_last_part_is_held_out(tokens: int, share: float, first: int) -> None:
    assert hold_out(tokens, share) == HeldOutRest(first=first, stop=tokens)


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_the_losses_of_either_part(make) -> None:
    """Entry i of a reading's losses belongs to token i + 1; the question after the document belongs to neither part."""
    held, losses = HeldOutRest(first=4, stop=7), make(1, 10)
    assert held.adapted(losses).tolist() == [1, 2, 3]
    assert held.rest(losses).tolist() == [4, 5, 6]
    assert held.rest(losses[:6]).tolist() == [4, 5, 6]
    with refused("the losses of a reading", 5, "at least 6"):
        held.rest(losses[:5])


def test_refusals() -> None:
    for share in (0.0, 1.0, -0.2, float("nan")):
        with refused("the held-out share", share, "above 0 and below 1"):
            hold_out(100, share)
    for tokens, share in ((3, 0.5), (10, 0.1), (10, 0.9), (0, 0.5)):
        with refused("a document's tokens", tokens):
            hold_out(tokens, share)
    for first, stop in ((1, 9), (8, 9)):
        with refused("the number of adapted tokens", first):
            HeldOutRest(first=first, stop=stop)
