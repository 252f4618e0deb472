"""The parts of the memory view without a model: a grid of heads, and a prediction with and without some writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from refine_lab.explore.attribution import WriteAttribution
from refine_lab.explore.erasing import Erasure, Prediction
from refine_lab.explore.targets import Target
from refine_lab.models.writes import MemoryPart
from tests.factories.side_by_side import string
from widgets.parts.memory_grid import MemoryGrid
from widgets.parts.memory_result import MemoryResult

PARTS = (MemoryPart(layer=0, name="fast_weights", heads=3), MemoryPart(layer=0, name="window", heads=2))


def memory_grid(note: str = "A sentence below the title.", *, diverging: bool = False) -> MemoryGrid:
    """Values over the whole scale, with one chosen head."""
    values = np.array([[0.0, 0.5, 4.0], [2.0, 3.0, np.nan]])
    made = MemoryGrid()
    made.show(PARTS, values - 2 * diverging, "Effect of all writes", note=note, diverging=diverging)
    made.chosen, made.error = [[0, 1]], "what went wrong"
    return made


def memory_result(decode: Any = string) -> MemoryResult:
    """The prediction of token 3 after token 4, with all writes and without that of token 2."""
    target = Target(position=4, token_ids=(3,))
    effects = np.linspace(-1, 1, 30).reshape(2, 3, 5)
    effects[1, 2] = np.nan
    attribution = WriteAttribution(target=target, value=-0.5, parts=PARTS, effects=effects, retained=np.ones((2, 3, 5)))
    before, after = (
        Prediction(
            value=value,
            rank=rank,
            alternatives=np.array([3, 4, 5]),
            probabilities=np.array([0.6, 0.2, 0.1]),
            answer_ids=(3, 4),
        )
        for value, rank in ((-0.5, 1), (-2.0, 3))
    )
    losses = np.array([np.nan, 1.0, 2.0, 3.0, 4.0, 5.0])
    erasure = Erasure(
        erased=(2,), cells=None, before=before, after=after, losses_before=losses, losses_after=losses + 1
    )
    made = MemoryResult()
    made.show(attribution, before, target, decode, erasure=erasure, tokens=[0, 1, 2, 3, 4, 5])
    made.error = "what went wrong"
    return made
