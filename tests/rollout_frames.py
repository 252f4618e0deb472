"""Frames of rollouts as `records.Run.rollouts` gives them, of a few words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

WORDS = [
    " very",
    " laid",
    " back",
    " lodge",
    " perfect",
    " hill",
    " A",
    "a",
    "\n",
    "</script>",
    "\x00",
    "\u202e",
    "|",
    "ß",
    "İ",
]


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def rows(*rollouts: Sequence[int], truth: Sequence[int] = (0, 1, 2), **columns: object) -> pd.DataFrame:
    """Rollouts of one position."""
    count = len(rollouts)
    frame = {
        "step": [3] * count,
        "sequence_id": [5] * count,
        "position": [20] * count,
        "member": [*range(count)],
        "prefix_ids": [[3, 4]] * count,
        "rollout_ids": [list(ids) for ids in rollouts],
        "target_ids": [list(truth)] * count,
        "logprobs": [[-0.5] * len(ids) for ids in rollouts],
        "entropy": [1.5] * count,
        **{name: [0.25 * i for i in range(count)] for name in ("cosine", "binary", "reward", "advantage")},
        **columns,
    }
    return pd.DataFrame(frame)


def random_frame(count: int, size: int, seed: int = 0) -> pd.DataFrame:
    """`count` rollouts, `size` a position, of 0 to 4 tokens, with values that repeat, are no number, or are -0."""
    draw = np.random.default_rng(seed)
    group = np.arange(count) // size
    truths = draw.integers(0, len(WORDS), (group[-1] + 1, 4))
    lengths = draw.integers(0, 5, count)
    parts = [
        rows(
            draw.integers(0, len(WORDS), lengths[i]).tolist(),
            truth=truths[group[i]].tolist(),
            step=[int(group[i]) // 3],
            position=[int(group[i] * 7 % 11)],
            sequence_id=[int(group[i])],
            member=[int(draw.integers(0, 9))],
            **{
                name: [float(draw.choice([-1.0, -0.0, 0.0, 0.1, 0.7, 1e-30, math.nan, math.inf, draw.normal()]))]
                for name in ("entropy", "cosine", "binary", "reward", "advantage")
            },
        )
        for i in range(count)
    ]
    return pd.concat(parts, ignore_index=True).sample(frac=1, random_state=seed).reset_index(drop=True)
