"""Greedy decoding: the most probable token after what a model has read, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from refine_lab.data.batches import padded
from refine_lab.models.base import FastWeightLM


@torch.no_grad()
def greedy_tokens(policy: FastWeightLM, prompts: Sequence[Sequence[int]]) -> Iterator[Int[Tensor, "B 1"]]:
    """The most probable next token of each prompt, then of each prompt with that token behind it, without an end.

    Each prompt is read once. A token is read when the next one is asked for. Prompts may be of unequal length.
    """
    batch = padded([np.array(prompt) for prompt in prompts], tuple(range(len(prompts)))).to(policy.device)
    trace = policy.read(batch.tokens, batch.lengths)
    state, hidden = trace.final_state, trace.hidden_at((batch.lengths - 1).unsqueeze(-1))
    del trace  # what the prompts' other states are made of
    while True:
        chosen = policy.head(hidden).argmax(-1)
        yield chosen
        step = policy.read(chosen, state=state)
        state, hidden = step.final_state, step.hidden_states


def greedy(policy: FastWeightLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> Int[Tensor, "B K"]:
    """The first `num_tokens` tokens of `greedy_tokens`."""
    return torch.cat(list(islice(greedy_tokens(policy, prompts), num_tokens)), 1)
