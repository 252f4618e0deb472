"""Write attribution: how much every earlier write to the memory contributes to a prediction.

A fast-weight memory is the sum of explicit writes, so the question has an exact answer. Every token's write to every
part and head of the memory is multiplied by a factor of 1 (see `models.writes`), and the effect of a write is the
derivative of the target by its factor: one forward and one backward pass for all tokens, layers and heads. Erasing a
write sets its factor to 0 (see `explore.erasing`), which costs one reading per choice of tokens and needs no
approximation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.explore.states import recorded, stacked
from refine_lab.explore.targets import Target, frozen, prefix_of, score_target
from refine_lab.method.rollout import Branches
from refine_lab.models import FastWeightLM
from refine_lab.models.writes import Cell, MemoryPart, heads_of, scaled_writes
from refine_lab.statistics.means import varies
from refine_lab.validation import require


@dataclass(frozen=True, eq=False, kw_only=True)
class WriteAttribution:
    """The effect of each token's write to each of M parts with H heads, for the tokens up to the target's position.

    `effects` [M, H, T] is d target / d factor, in nats: positive where the write raises the target. To first order, the
    target changes by -effect when the write is erased. `retained` [M, H, T] is the fraction of a write that the gates
    have left at the position, exp of the sum of the log gates after it; 1 without a gate. Both are NaN beyond a part's
    heads.
    """

    target: Target
    value: float  # of the target, in nats
    parts: tuple[MemoryPart, ...]
    effects: Float[np.ndarray, "M H T"]
    retained: Float[np.ndarray, "M H T"]

    def by_token(self, cells: Collection[Cell] | None = None) -> Float[np.ndarray, "T"]:
        """Returns the sum of the absolute effects of each token over all heads, or over the given ones."""
        return np.nansum(np.abs(self._chosen(cells)), axis=(0, 1))

    def signed(self, cells: Collection[Cell] | None = None) -> Float[np.ndarray, "T"]:
        """Returns the sum of the effects of each token, with their signs, over all heads or the given ones."""
        return np.nansum(self._chosen(cells), axis=(0, 1))

    def by_cell(self) -> Float[np.ndarray, "M H"]:
        """Returns the sum of the absolute effects of all tokens in each head; NaN beyond a part's heads."""
        missing = np.isnan(self.effects).all(-1)
        return np.where(missing, np.nan, np.nansum(np.abs(self.effects), axis=-1))

    def top(self, count: int = 1, cells: Collection[Cell] | None = None) -> list[int]:
        """Returns the tokens with the largest absolute effects, in descending order."""
        return np.argsort(-self.by_token(cells), kind="stable")[:count].tolist()

    def _chosen(self, cells: Collection[Cell] | None) -> Float[np.ndarray, "M H T"]:
        if cells is None:
            return self.effects
        chosen, numbers = np.zeros(self.effects.shape[:2], bool), {part.key: n for n, part in enumerate(self.parts)}
        for key, heads in heads_of(self.parts, cells).items():
            chosen[numbers[key], heads] = True
        return np.where(chosen[..., None], self.effects, 0.0)


def write_attribution(policy: FastWeightLM, token_ids: Int[Tensor, "T"], target: Target) -> WriteAttribution:
    """Returns the effect of every write up to the target's position, by one forward and one backward pass.

    In a hybrid's full attention and in LaCT's window a write is a token's values (see `models.writes`).

    Raises ValueError for a family without such factors, a position outside the document, target tokens outside the
    vocabulary, and a model whose activations are recomputed in the backward pass.
    """
    parts = policy.memory_parts
    require(not policy.is_activation_checkpointing, "activation_checkpointing", "on", "'none' for attribution")
    tokens = prefix_of(policy, token_ids, target)
    dtype = torch.promote_types(policy.dtype, torch.float32)
    shape, device = tokens.shape, tokens.device
    with frozen(policy):
        factors = {p.key: torch.ones(*shape, p.heads, dtype=dtype, device=device, requires_grad=True) for p in parts}
        with scaled_writes(factors), recorded(policy, "log_gate") as gates:
            trace = policy.read(tokens)
        last = torch.tensor([[target.position]], device=device)
        value = score_target(policy, Branches.of(trace, last, 1), target).logprobs.sum()
        effects = torch.autograd.grad(value, list(factors.values()), materialize_grads=True)
    return WriteAttribution(
        target=target,
        value=float(value.detach()),
        parts=parts,
        effects=stacked([effect[0].T.cpu() for effect in effects]),
        retained=stacked([_retained(part, gates, shape[1]) for part in parts]),
    )


def _retained(part: MemoryPart, gates: dict[int, Tensor], length: int) -> Float[Tensor, "H T"]:
    """Returns the fraction of each token's write that the later gates leave at the end."""
    gate = gates.get(part.layer) if part.name == "recurrent_state" else None
    if gate is None:
        return torch.ones(part.heads, length)
    total = gate.double().cumsum(0)
    return (total[-1:] - total).exp().float().T


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well effects by gradient predict exact effects of erasing the same tokens: Pearson's r, and equal signs."""

    r: float  # NaN for fewer than three choices of tokens, or constant effects
    same_sign: float  # fraction of the choices


def agreement(
    attribution: WriteAttribution, groups: Sequence[Collection[int]], erased: Float[np.ndarray, "G"]
) -> Agreement:
    """Compares the attribution with `erased`, the changes of the target when each group of tokens is erased."""
    signed = attribution.signed()
    predicted = np.array([-signed[sorted(group)].sum() for group in groups])
    require(len(predicted) == len(erased), "the number of erased groups", len(erased), str(len(predicted)))
    known = len(predicted) >= 3 and varies(predicted) and varies(np.asarray(erased))
    r = float(np.corrcoef(predicted, erased)[0, 1]) if known else float("nan")
    return Agreement(r=r, same_sign=float((np.sign(predicted) == np.sign(erased)).mean()))
