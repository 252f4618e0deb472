"""Erasing: what a model would predict without some of its writes.

The model reads on from the state before the first erased token, with the factors of these writes at 0 in every part of
the memory, or in chosen heads. Later tokens are computed anew, as in a model that had never written them: what they
write may differ, too. The model and the original trace are not changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.explore.targets import Target, prefix_of, score_target
from refine_lab.method.rollout import Branches
from refine_lab.models import FastWeightLM, State, Trace
from refine_lab.models.decoding import continued
from refine_lab.models.writes import Cell, Factors, heads_of, scaled_writes
from refine_lab.validation import require

ROWS = 16
"""Number of choices of tokens that are read together."""


@dataclass(frozen=True, eq=False)
class ErasedTrace(Trace):
    """The trace of one row whose tokens from `first` on were read again; states before it are the original ones."""

    before: Trace | None = None
    after: Trace | None = None
    first: int = 0

    def state_at(self, positions: Int[Tensor, "B P"]) -> State:
        assert self.after is not None
        positions = torch.as_tensor(positions, device=self.lengths.device)
        early = positions[0] < self.first
        if self.before is None or not early.any():
            return self.after.state_at(positions - self.first)
        if early.all():
            return self.before.state_at(positions)
        order = torch.cat([early.nonzero(), (~early).nonzero()]).flatten()
        states = (self.before.state_at(positions[:, early]), self.after.state_at(positions[:, ~early] - self.first))
        return State.stack(states).select(order.argsort())


def erasing_factors(
    policy: FastWeightLM, erased: Sequence[Collection[int]], length: int, cells: Collection[Cell] | None = None
) -> Factors:
    """Returns factors [R, T, H] that are 0 for the `erased` tokens of each row, in all heads or the given ones.

    Raises ValueError for tokens outside the row, and for a head that the model does not have.
    """
    parts = {part.key: part for part in policy.memory_parts}
    keep = torch.ones(len(erased), length, device=policy.device)
    for row, tokens in enumerate(erased):
        outside = [token for token in tokens if not 0 <= token < length]
        require(not outside, "an erased token", outside[:1], f"from 0 to {length - 1}")
        keep[row, sorted(tokens)] = 0
    factors = {}
    for key, heads in heads_of(policy.memory_parts, cells).items():
        factors[key] = keep.new_ones(*keep.shape, parts[key].heads)
        factors[key][..., heads] = keep.unsqueeze(-1)
    return factors


def erase(
    policy: FastWeightLM,
    trace: Trace,
    token_ids: Int[Tensor, "T"],
    erased: Collection[int],
    cells: Collection[Cell] | None = None,
) -> ErasedTrace:
    """Returns the trace of the document without the writes of the `erased` tokens.

    `trace` is that of the document as it is, one row. The prefix before the first erased token is not read again.

    Raises ValueError for no tokens, tokens outside the document, and as `erasing_factors`.
    """
    require(len(erased) > 0, "the erased tokens", "none", "at least one token")
    outside = [token for token in erased if not 0 <= token < len(token_ids)]
    require(not outside, "an erased token", outside[:1], f"from 0 to {len(token_ids) - 1}")
    first = min(erased)
    after = _read_on(policy, trace, token_ids, [erased], first, cells)
    hidden = torch.cat([trace.hidden_states[:, :first], after.hidden_states], 1)
    return ErasedTrace(
        hidden, trace.lengths, (), trace.start, before=trace if first else None, after=after, first=first
    )


@torch.no_grad()
def erasing_effects(
    policy: FastWeightLM,
    trace: Trace,
    token_ids: Int[Tensor, "T"],
    target: Target,
    groups: Sequence[Collection[int]],
    cells: Collection[Cell] | None = None,
) -> Float[np.ndarray, "G"]:
    """Returns by how much the target changes when each group of tokens is erased, in nats; exact, `ROWS` groups at a time.

    `trace` is that of the document as it is, one row. Raises ValueError as `erase`, and for tokens after the target's
    position.
    """
    prefix = prefix_of(policy, token_ids, target)[0]
    require(all(map(len, groups)), "the erased tokens", "none", "at least one token in every group")
    outside = [token for group in groups for token in group if not 0 <= token <= target.position]
    require(not outside, "an erased token", outside[:1], f"from 0 to {target.position}, the target's position")
    last = torch.tensor([[target.position]], device=prefix.device)
    intact = score_target(policy, Branches.of(trace, last, 1), target).logprobs
    order = sorted(range(len(groups)), key=lambda i: min(groups[i]))
    effects = np.zeros(len(groups))
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        first = min(groups[chosen[0]])
        after = _read_on(policy, trace, prefix, [groups[i] for i in chosen], first, cells)
        ends = (last - first).expand(len(chosen), -1)
        scores = score_target(policy, Branches.of(after, ends, 1), target).logprobs
        effects[chosen] = (scores - intact).double().cpu().numpy()
    return effects


def _read_on(
    policy: FastWeightLM,
    trace: Trace,
    token_ids: Int[Tensor, "T"],
    groups: Sequence[Collection[int]],
    first: int,
    cells: Collection[Cell] | None,
) -> Trace:
    """Reads the tokens from `first` on, one row for each group, with the group's writes switched off."""
    rest = token_ids[first:].to(policy.device).expand(len(groups), -1)
    shifted = [[token - first for token in group] for group in groups]
    state = None
    if first:
        state = trace.state_at(torch.tensor([[first - 1]], device=policy.device)).repeat(len(groups))
    with scaled_writes(erasing_factors(policy, shifted, rest.shape[1], cells)):
        return policy.read(rest, state=state)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """What a model predicts at the target's position."""

    value: float  # of the target, in nats
    rank: int  # of the target's first token, from 1
    alternatives: Int[np.ndarray, "A"]  # the most probable next tokens, in descending order
    probabilities: Float[np.ndarray, "A"]
    answer_ids: tuple[int, ...]  # greedy continuation


@torch.no_grad()
def predict(
    policy: FastWeightLM, trace: Trace, target: Target, answer_tokens: int = 8, alternatives: int = 5
) -> Prediction:
    """Returns the prediction at the target's position of a document with this trace, one row."""
    last = torch.tensor([[target.position]], device=policy.device)
    branches = Branches.of(trace, last, 1)
    probabilities = policy.head(branches.hidden_states[0]).float().softmax(-1)
    best = probabilities.topk(min(alternatives, len(probabilities)))
    written = islice(continued(policy, branches.state, branches.hidden_states.unsqueeze(1)), answer_tokens)
    return Prediction(
        value=float(score_target(policy, branches, target).logprobs),
        rank=int((probabilities > probabilities[target.token_ids[0]]).sum()) + 1,
        alternatives=best.indices.cpu().numpy(),
        probabilities=best.values.cpu().numpy(),
        answer_ids=tuple(int(token) for token in written),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Erasure:
    """A document with and without some writes: the prediction at the target, and every token's loss."""

    erased: tuple[int, ...]
    cells: tuple[Cell, ...] | None  # heads in which they were erased; None: all
    before: Prediction
    after: Prediction
    losses_before: Float[np.ndarray, "T"]  # next-token loss of each token, in nats; the first is NaN
    losses_after: Float[np.ndarray, "T"]
