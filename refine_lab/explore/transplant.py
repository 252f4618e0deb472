"""Transplants: a state with parts of another document's memory, and which parts carry a fact.

Short convolutions are not part of the memory: a transplanted state keeps its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refine_lab.explore.targets import Target, score_target
from refine_lab.method.rollout import Branches
from refine_lab.models import FastWeightLM, State
from refine_lab.models.writes import Cell, MemoryPart, heads_of
from refine_lab.training.adaptation import padded_batch
from refine_lab.validation import require

ROWS = 16
"""Number of transplanted states that are read on together."""


def transplant(policy: FastWeightLM, state: State, other: State, cells: Collection[Cell] | None = None) -> State:
    """Returns `state` with the memory in the given heads, or in all of them, taken from `other`; both have one row.

    Neither state is changed. Raises ValueError for a head that the model does not have, states with more than one row
    or of other models, and for parts other than `recurrent_state` unless both have read the same number of tokens,
    since these parts hold tokens by position.
    """
    require(state.rows == other.rows == 1, "the rows of both states", [state.rows, other.rows], "1 each")
    parts = {part.key: part for part in policy.memory_parts}
    chosen = heads_of(policy.memory_parts, cells)
    by_position = any(heads and name != "recurrent_state" for (_, name), heads in chosen.items())
    lengths = int(state.lengths), int(other.lengths)
    same = "equal, since attention and LaCT hold tokens by position"
    require(not by_position or lengths[0] == lengths[1], "the tokens read by both states", list(lengths), same)

    def mixed(tensors: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: _mixed(policy, parts, chosen, key, x, theirs[key]) for key, x in tensors.items()}

    own = state.tensors.keys() == other.tensors.keys() and state.shared.keys() == other.shared.keys()
    require(own, "the tensors of the other state", sorted(other.tensors)[:3], "those of this model")
    one = [_one_source(each) for each in (state, other)]
    return replace(one[0], tensors=mixed(one[0].tensors, one[1].tensors), shared=mixed(one[0].shared, one[1].shared))


def _one_source(state: State) -> State:
    """Returns a state of one row in which only the source of that row is shared."""
    if state.sources is None:
        return state
    shared = {name: x.index_select(0, state.sources) for name, x in state.shared.items()}
    return replace(state, shared=shared, sources=torch.zeros_like(state.sources))


def _mixed(
    policy: FastWeightLM,
    parts: Mapping[tuple[int, str], MemoryPart],
    chosen: Mapping[tuple[int, str], list[int]],
    key: str,
    x: Tensor,
    other: Tensor,
) -> Tensor:
    """Returns a state tensor with the chosen heads of another one."""
    layer, _, name = key.partition(".")
    part_name, axis = policy.STATE_PARTS.get(name, ("", 0))
    part = parts.get((int(layer), part_name))
    if part is None or part.key not in chosen:
        return x
    require(x.shape == other.shape, f"the other state's {key}", list(other.shape), f"of shape {list(x.shape)}")
    if len(chosen[part.key]) == part.heads:
        return other
    take = torch.zeros(part.heads, dtype=torch.bool, device=x.device)
    take[chosen[part.key]] = True
    take = take.view(*[1] * axis, part.heads, *[1] * (x.ndim - axis))
    mine, theirs = (y.unflatten(axis, (part.heads, -1)) for y in (x, other.to(x)))
    return torch.where(take, theirs, mine).flatten(axis, axis + 1)


def _grafted(policy: FastWeightLM, own: State, other: State, graft: list[Cell] | None) -> State:
    """Returns `own` with the given heads of `other`; None: `other` as a whole, its convolutions' windows included."""
    return other if graft is None else transplant(policy, own, other, graft)


@dataclass(frozen=True, eq=False, kw_only=True)
class Counterfactual:
    """Which heads carry a fact: a document's memory, with one head of the memory of a changed document at a time.

    `effects` [M, H] is by how much a head's transplant moves log p(changed answer) - log p(answer), in nats, `of_part`
    [M] the same for all heads of a part, and `total` for the whole state. They need not add up: the heads work together.
    """

    parts: tuple[MemoryPart, ...]
    original: float  # log p(changed answer) - log p(answer) after the original document
    total: float
    effects: Float[np.ndarray, "M H"]  # NaN beyond a part's heads
    of_part: Float[np.ndarray, "M"]


@torch.no_grad()
def counterfactual(
    policy: FastWeightLM,
    original: Sequence[int],
    changed: Sequence[int],
    question: Sequence[int],
    answers: tuple[Sequence[int], Sequence[int]],
) -> Counterfactual:
    """Reads two versions of a document once, and asks the question after each transplant of one head or one part.

    `answers` are those to the question in the original and in the changed document. Raises ValueError as `transplant`,
    and for a document of fewer than two tokens or an empty question.
    """
    require(len(question) > 0, "the question's tokens", "none", "at least one")
    batches = [padded_batch(policy, [torch.tensor(list(ids))]) for ids in (original, changed)]
    own, other = (policy.read(batch.tokens, batch.lengths).final_state for batch in batches)
    parts = policy.memory_parts
    cells = [(part.layer, part.name, head) for part in parts for head in range(part.heads)]
    wholes = [[cell for cell in cells if cell[:2] == part.key] for part in parts]
    grafts: list[list[Cell] | None] = [[], None, *([cell] for cell in cells), *wholes]
    asked = torch.tensor(list(question), device=policy.device).unsqueeze(0)
    target = Target(position=1, token_ids=tuple(answers[1]), against=tuple(answers[0]))
    scores = []
    for start in range(0, len(grafts), ROWS):
        block = [_grafted(policy, own, other, graft) for graft in grafts[start : start + ROWS]]
        trace = policy.read(asked.expand(len(block), -1), state=State.stack(block))
        last = torch.full((len(block), 1), asked.shape[1] - 1, device=policy.device)
        scores += score_target(policy, Branches.of(trace, last, 1), target).logprobs.tolist()
    moved = np.array(scores[2:]) - scores[0]
    effects = np.full((len(parts), max(part.heads for part in parts)), np.nan)
    for (layer, name, head), effect in zip(cells, moved, strict=False):
        effects[[part.key for part in parts].index((layer, name)), head] = effect
    return Counterfactual(
        parts=parts,
        original=scores[0],
        total=scores[1] - scores[0],
        effects=effects,
        of_part=moved[len(cells) :],
    )
