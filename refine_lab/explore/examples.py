"""Rollouts from held-out text with their cosine rewards, in the form of the paper's table F.1."""

from __future__ import annotations

import pandas as pd
import torch

from refine_lab.data.batches import SequenceData
from refine_lab.explore.reading import read_document
from refine_lab.explore.rollouts import rollout_frame, rollouts_at
from refine_lab.method.rewards import REWARDS
from refine_lab.models.loading import load_model, manifest_of
from refine_lab.recipes import midtrain
from refine_lab.rng import Draws

TOKENS = 256
"""Tokens of a held-out document."""


def example_rollouts(model: str, *, examples: int = 6, n: int = 4, k: int = 5, seed: int = 0) -> pd.DataFrame:
    """Returns `n` rollouts of `k` tokens from a random position of each of the first `examples` held-out documents.

    Columns: `example` (from 1), `reference`, `rollout`, and the `cosine` reward. The positions depend on the seed alone.
    """
    policy, tokenizer = load_model(model, device="cpu")
    data = SequenceData(midtrain().data, tokenizer, seed, "validation", manifest_of(model))
    rows, draws = [], Draws(seed=seed)
    for number, tokens in enumerate(data.validation().tokens[:examples], start=1):
        generator = draws.generator(number, "example")
        position = int(torch.randint(TOKENS // 2, TOKENS - k - 1, (1,), generator=generator))
        reading, trace = read_document(policy, tokens[:TOKENS])
        found = rollout_frame(rollouts_at(policy, reading, trace, [position], n=n, k=k, seed=seed), REWARDS["cosine"])
        for each in found.to_dict("records"):
            texts = {
                "reference": tokenizer.decode(each["target_ids"]),
                "rollout": tokenizer.decode(each["rollout_ids"]),
            }
            rows.append({"example": number, **texts, "cosine": each["cosine"]})
    return pd.DataFrame(rows)
