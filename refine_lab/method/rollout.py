"""Rollouts: continuations of every selected prefix, branched from the state after it (paper, equations 7 and 8).

All branches of all rows run in one batch, and no prefix is read again. The first token of a rollout is drawn from the
hidden state in the trace; each further token costs one step of the recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import State, Trace
from refine_lab.ops.head import HEAD_ROWS
from refine_lab.rng import Draws, inverse_cdf


@dataclass(frozen=True, eq=False)
class Branches:
    """The starting points of R rollouts: the state after each prefix and the hidden state of its last token."""

    state: State
    hidden_states: Float[Tensor, "R D"]

    @staticmethod
    def of(trace: Trace, positions: Int[Tensor, "B C"], group_size: int, *, detach: bool = False) -> Branches:
        """Returns the branches at the given positions, with `group_size` adjacent copies of each."""
        state, hidden = trace.state_at(positions), trace.hidden_at(positions).flatten(0, 1)
        if detach:
            state, hidden = state.detach(), hidden.detach()
        return Branches(state.repeat(group_size), hidden.repeat_interleave(group_size, 0))

    def detach(self) -> Branches:
        return Branches(self.state.detach(), self.hidden_states.detach())


@dataclass(frozen=True, eq=False)
class Continuation:
    """The policy's reading of rollout tokens: the hidden states with these tokens as inputs, and their statistics."""

    hidden_states: Float[Tensor, "R K D"]
    logprobs: Float[Tensor, "R K"]
    entropies: Float[Tensor, "R K"]


@torch.no_grad()
def sample(
    policy: FastWeightLM, branches: Branches, uniforms: Float[Tensor, "R K"], temperature: float
) -> Int[Tensor, "R K"]:
    """Samples x_{t+1..t+k} ~ pi(. | prefix) at `temperature` (eq. 7), by inverse CDF from one uniform number per token.

    Any token of the vocabulary can be drawn, including end-of-text, which the release excludes.
    """
    state, hidden, tokens = branches.state, branches.hidden_states, []
    for column in uniforms.unbind(1):
        if tokens:
            step = policy.read(tokens[-1].unsqueeze(1), state=state)
            state, hidden = step.final_state, step.hidden_states[:, 0]
        tokens.append(_draw(policy, hidden, column, temperature))
    return torch.stack(tokens, 1)


def follow(policy: FastWeightLM, branches: Branches, tokens: Int[Tensor, "R K"], temperature: float) -> Continuation:
    """Reads `tokens` from their branches in one forward pass over k tokens; differentiable in the policy and the prefix.

    logprobs[:, j] belongs to token j given the prefix and the tokens before it, at the sampling temperature;
    hidden_states[:, j] is the final-layer hidden state with token j as input, h^pred of equation 7.
    """
    read = policy.read(tokens, state=branches.state).hidden_states
    before = torch.cat([branches.hidden_states.unsqueeze(1), read[:, :-1]], 1)
    stats = policy.head(before, tokens, temperature=temperature)
    return Continuation(read, stats.logprobs, stats.entropies)


def rollout_uniforms(
    draws: Draws, sequence_ids: tuple[int, ...], num_chunks: int, group_size: int, rollout_length: int
) -> Float[Tensor, "R K"]:
    """Returns the uniform numbers of a batch's rollouts, keyed by sequence."""
    return draws.uniforms(sequence_ids, "rollout", (num_chunks, group_size, rollout_length)).flatten(0, 2)


def target_index(positions: Int[Tensor, "B C"], rollout_length: int) -> Int[Tensor, "B _"]:
    """Returns the indices t+1..t+k of the reference continuations in their rows."""
    offsets = torch.arange(1, rollout_length + 1, device=positions.device)
    return (positions.unsqueeze(-1) + offsets).flatten(1)


def _draw(
    policy: FastWeightLM, hidden: Float[Tensor, "R D"], uniforms: Float[Tensor, "R"], temperature: float
) -> Tensor:
    drawn = []
    for rows, numbers in zip(hidden.split(HEAD_ROWS), uniforms.split(HEAD_ROWS), strict=True):
        logits = policy.head(rows).double() / temperature
        drawn.append(inverse_cdf(logits.softmax(-1), numbers.to(logits.device)))
    return torch.cat(drawn)
