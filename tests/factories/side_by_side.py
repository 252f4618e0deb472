"""A document under two models without a model: readings, likely tokens, and rollouts in pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.rollout_pairs import pair_rollouts
from refine_lab.explore.side_by_side import ReadingPair
from widgets.parts.likely_tokens import LikelyTokens
from widgets.parts.measure_table import measure_table
from widgets.parts.rollout_pairs import RolloutPairs
from widgets.parts.text_tables import TextTables

WORDS = ["The", " quick", " <b>brown", " fox", " jumps", " over"]


def string(ids: Any) -> str:
    return WORDS[ids[0]]


def reading(logprobs: list[float], likely: list[int], probabilities: list[float]) -> DocumentReading:
    count = len(WORDS)
    return DocumentReading(
        token_ids=np.arange(count, dtype=np.int32),
        entropies=np.full(count, 1.0),
        logprobs=np.array([np.nan, *logprobs]),
        ranks=np.arange(count, dtype=np.int32),
        alternatives=np.tile(np.array(likely, dtype=np.int32), (count, 1)),
        probabilities=np.tile(np.array(probabilities, dtype=np.float32), (count, 1)),
    )


def reading_pair() -> ReadingPair:
    a = reading([-1.0, -2.0, -3.0, -4.0, -1.0], [3, 4, 5], [0.5, 0.2, 0.1])
    b = reading([-1.0, -1.0, -2.5, -4.0, -1.5], [3, 2, 4], [0.6, 0.2, 0.1])
    return ReadingPair(token_ids=a.token_ids, a=a, b=b, key_tokens=np.arange(6) == 3, key_model="A")


def recorded(rollout: list[int]) -> pd.DataFrame:
    row = {
        "step": 0,
        "sequence_id": 0,
        "position": 2,
        "sample_index": 0,
        "prefix_ids": [0, 1, 2],
        "target_ids": [3, 4, 5],
    }
    return pd.DataFrame([row | {"rollout_ids": rollout, "logprobs": [-1.0] * 3, "reward": 0.5, "binary": 1 / 3}])


def likely_tokens(decode: Any = string) -> LikelyTokens:
    """What both models expect in place of token 3."""
    made = LikelyTokens()
    made.show(reading_pair(), decode, ["one", "other"])
    made.selected, made.error = 3, "what went wrong"
    return made


def rollout_pairs(decode: Any = string) -> RolloutPairs:
    """One pair of rollouts, which differ in two tokens."""
    made = RolloutPairs()
    made.show(pair_rollouts(recorded([3, 0, 5]), recorded([3, 1, 1])), decode, "Rollouts before token 3")
    made.error = "what went wrong"
    return made


def measures(heading: str = "A = one and B = other") -> TextTables:
    return TextTables.of([measure_table(reading_pair(), heading)])
