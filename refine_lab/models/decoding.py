"""Greedy decoding, token by token, from the state after a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.data.batches import padded
from refine_lab.models.base import FastWeightLM


@torch.no_grad()
def greedy_tokens(policy: FastWeightLM, prompts: Sequence[Sequence[int]]) -> Iterator[Int[Tensor, "B 1"]]:
    """Yields the most probable next token of each prompt, then of each prompt extended by that token, indefinitely.

    Each prompt is read once, and each generated token when the next one is requested. Prompts may differ in length.
    """
    batch = padded([np.array(prompt) for prompt in prompts], tuple(range(len(prompts)))).to(policy.device)
    trace = policy.read(batch.tokens, batch.lengths)
    state, hidden = trace.final_state, trace.hidden_at((batch.lengths - 1).unsqueeze(-1))
    del trace  # what the prompts' other states are made of
    yield from continued(policy, state, hidden)


@torch.no_grad()
def continued(policy: FastWeightLM, state: Any, hidden: Float[Tensor, "B 1 D"]) -> Iterator[Int[Tensor, "B 1"]]:
    """Yields tokens as `greedy_tokens` does, from a `State` and the hidden states of its rows' last tokens."""
    while True:
        chosen = policy.head(hidden).argmax(-1)
        yield chosen
        step = policy.read(chosen, state=state)
        state, hidden = step.final_state, step.hidden_states


def greedy(policy: FastWeightLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> Int[Tensor, "B K"]:
    """Returns the first `num_tokens` tokens of `greedy_tokens`."""
    return torch.cat(list(islice(greedy_tokens(policy, prompts), num_tokens)), 1)
