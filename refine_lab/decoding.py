"""Greedy decoding: the most probable token after what a model has read, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from refine_lab.models.base import FastWeightLM
from refine_lab.types import Batch


@torch.no_grad()
def greedy_tokens(policy: FastWeightLM, prompts: Batch) -> Iterator[Int[Tensor, "B 1"]]:
    """The most probable next token of each prompt, then of each prompt with that token behind it, without an end.

    Each prompt is read once. A token is read when the next one is asked for.
    """
    trace = policy.read(prompts.tokens, prompts.lengths)
    state, hidden = trace.final_state, trace.hidden_at((prompts.lengths - 1).unsqueeze(-1))
    del trace  # what the prompts' other states are made of
    while True:
        chosen = policy.head(hidden).argmax(-1)
        yield chosen
        step = policy.read(chosen, state=state)
        state, hidden = step.final_state, step.hidden_states
