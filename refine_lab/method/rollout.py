"""Rollouts: continuations of every selected prefix, branched from the state after it (paper, equations 7 and 8).

All branches of all rows run in one batch, and no prefix is read again. The first token of a rollout is drawn from the
hidden state in the trace; each further token costs one step of the recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.host import to_device
from refine_lab.models.base import FastWeightLM
from refine_lab.models.decode_step import Decoder
from refine_lab.models.state import State, Trace
from refine_lab.ops.head import HEAD_ROWS
from refine_lab.rng import inverse_cdf
from refine_lab.types import Batch


@dataclass(frozen=True, eq=False)
class Branches:
    """The starting points of R rollouts: the state after each prefix and the hidden state of its last token."""

    state: State
    hidden_states: Float[Tensor, "R D"]

    @staticmethod
    def of(trace: Trace, positions: Int[Tensor, "B C"], group_size: int, *, detach: bool = False) -> Branches:
        """Returns the branches at the given positions, with `group_size` adjacent copies of each."""
        prefixes = Branches(trace.state_at(positions), trace.hidden_at(positions).flatten(0, 1))
        ends = prefixes.detach() if detach else prefixes
        return Branches(ends.state.repeat(group_size), ends.hidden_states.repeat_interleave(group_size, 0))

    def detach(self) -> Branches:
        return Branches(self.state.detach(), self.hidden_states.detach())


@dataclass(frozen=True, eq=False)
class Continuation:
    """The policy's outputs on rollout tokens: the hidden states with these tokens as inputs, and their statistics."""

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
    decode, hidden, tokens = Decoder(policy, branches.state, branches.hidden_states), branches.hidden_states, []
    for column in to_device(uniforms, hidden.device).unbind(1):
        if tokens:
            hidden = decode(tokens[-1])
        tokens.append(_draw(policy, hidden, column, temperature))
    return torch.stack(tokens, 1)


def read_rollouts(
    policy: FastWeightLM, branches: Branches, tokens: Int[Tensor, "R K"], temperature: float
) -> Continuation:
    """Reads `tokens` from their branches in one forward pass over k tokens; differentiable in the policy and the prefix.

    logprobs[:, j] belongs to token j given the prefix and the tokens before it, at the sampling temperature;
    hidden_states[:, j] is the final-layer hidden state with token j as input, h^pred of equation 7.
    """
    read = policy.read(tokens, state=branches.state).hidden_states
    before = torch.cat([branches.hidden_states.unsqueeze(1), read[:, :-1]], 1)
    stats = policy.head(before, tokens, temperature=temperature)
    return Continuation(read, stats.logprobs, stats.entropies)


def detached_logprobs(
    policy: FastWeightLM, trace: Trace, batch: Batch, positions: Int[Tensor, "B C"], rollout_length: int
) -> Float[Tensor, "B C K"]:
    """log p(x_{t+j} | x_{<t+j}) of the k reference tokens after each position t, [B, C, K], read again from the states at t.

    The gradient reaches the weights through these k tokens alone, as that of rollouts from detached states does.
    """
    index = positions.unsqueeze(-1) + torch.arange(1, rollout_length + 1, device=positions.device)
    tokens = batch.tokens.gather(1, index.flatten(1)).view(-1, rollout_length)
    continuation = read_rollouts(policy, Branches.of(trace, positions, 1, detach=True), tokens, temperature=1.0)
    return continuation.logprobs.view(index.shape)


def _draw(
    policy: FastWeightLM, hidden: Float[Tensor, "R D"], uniforms: Float[Tensor, "R"], temperature: float
) -> Tensor:
    parts = zip(hidden.split(HEAD_ROWS), uniforms.split(HEAD_ROWS), strict=True)
    return torch.cat([inverse_cdf((policy.head(h).double() / temperature).softmax(-1), u) for h, u in parts])
