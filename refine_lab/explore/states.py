"""What the fast weights hold along a document: size, rank and change of every state matrix, and where writes are strongest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from refine_lab.config import require
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import Trace


@dataclass(frozen=True, eq=False, kw_only=True)
class StateSummary:
    """Of M matrices (a layer's, by name) of H heads each, at P positions of one document. NaN beyond a matrix's own heads."""

    positions: Int[np.ndarray, "P"]
    "Each state is the one after this token."
    layers: tuple[int, ...]
    "Of each matrix, its layer."
    names: tuple[str, ...]
    "Of each matrix: `recurrent_state` (DeltaNet), or `w0`, `w1`, `w2` (LaCT)."
    norms: Float[np.ndarray, "M H P"]
    "Frobenius norm."
    effective_ranks: Float[np.ndarray, "M H P"]
    "exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007); 0 for a matrix of zeros."
    changes: Float[np.ndarray, "M H P"]
    "Norm of the difference to the state at the position before, relative to that one's norm; NaN at the first."
    write_strengths: Float[np.ndarray, "L H T"]
    "How strongly each token writes in each layer that tells: beta (DeltaNet), mean learning rate (LaCT)."
    write_layers: tuple[int, ...]
    "Those layers."


@contextmanager
def written(policy: FastWeightLM) -> Iterator[dict[int, Float[Tensor, "T H"]]]:
    """While the policy reads one row: of each layer that tells how strongly tokens write, by number."""
    found: dict[int, Tensor] = {}
    tellers = [module for module in policy.modules() if hasattr(module, "write_strengths")]

    def listener(number: int):
        def listen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            found[number] = module.write_strengths(arguments[0])[0].detach().float().cpu()  # type: ignore[operator]

        return listen

    hooks = [module.register_forward_pre_hook(listener(number)) for number, module in enumerate(tellers)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def summarise(
    trace: Trace, positions: Sequence[int], writes: dict[int, Float[Tensor, "T H"]], fast_weights: Sequence[str]
) -> StateSummary:
    """The states at rising positions of the one row that a trace has read; nothing is read again.

    `fast_weights` are the names of the matrices (`FastWeightLM.FAST_WEIGHTS`). Raises ValueError for positions that do not
    rise, and for a state that holds none of these matrices.
    """
    rising = len(positions) > 0 and all(a < b for a, b in pairwise(positions))
    require(rising, "positions", list(positions)[:5], "rising, at least one")
    state = trace.state_at(torch.tensor([list(positions)], device=trace.hidden_states.device))
    found: dict[tuple[int, str], Tensor] = {}
    for part in (state.tensors, state.shared):
        for key, value in part.items():
            layer, _, name = key.partition(".")
            if name in fast_weights:
                of_row = value if part is state.tensors or state.sources is None else value[state.sources]
                found[int(layer), name] = of_row.float()
    require(bool(found), "the model's state", sorted({k.partition(".")[2] for k in state.tensors}), "one with matrices")
    keys = sorted(found)
    numbers = [_numbers(found[key]) for key in keys]
    norms, ranks, changes = (_stacked([each[i] for each in numbers]) for i in range(3))
    return StateSummary(
        positions=np.array(positions),
        layers=tuple(layer for layer, _ in keys),
        names=tuple(name for _, name in keys),
        norms=norms,
        effective_ranks=ranks,
        changes=changes,
        write_strengths=_stacked([writes[number].T for number in sorted(writes)]),
        write_layers=tuple(sorted(writes)),
    )


def _numbers(states: Float[Tensor, "P H a b"]) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, effective rank and change of each head's matrix, [H, P] each."""
    norms = torch.linalg.matrix_norm(states)
    singular = torch.linalg.svdvals(states)
    shares = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    ranks = torch.where(norms > 0, torch.special.entr(shares).sum(-1).exp(), 0)
    changes = torch.full_like(norms, torch.nan)
    changes[1:] = torch.linalg.matrix_norm(states[1:] - states[:-1]) / norms[:-1].clamp(min=1e-30)
    return norms.T.cpu(), ranks.T.cpu(), changes.T.cpu()


def _stacked(parts: Sequence[Float[Tensor, "_ _2"]]) -> Float[np.ndarray, "M H P"]:
    """Matrices of several numbers of heads as one array, NaN where one has fewer."""
    if not parts:
        return np.zeros((0, 0, 0), np.float32)
    heads = max(len(part) for part in parts)
    array = np.full((len(parts), heads, parts[0].shape[1]), np.nan, np.float32)
    for i, part in enumerate(parts):
        array[i, : len(part)] = part.numpy()
    return array
