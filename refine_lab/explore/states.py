"""Summarises the fast weights along a document: norm, rank and change of every state matrix, and write strengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from refine_lab.models import FastWeightLM, Trace
from refine_lab.validation import require


@dataclass(frozen=True, eq=False, kw_only=True)
class StateSummary:
    """Statistics of M matrices (a layer's, by name) with H heads each at P positions; NaN beyond a matrix's heads."""

    positions: Int[np.ndarray, "P"]  # each state is the one after the token at this position
    layers: tuple[int, ...]  # of each matrix
    names: tuple[str, ...]  # of each matrix: `recurrent_state` (DeltaNet), or `w0`, `w1`, `w2` (LaCT)
    norms: Float[np.ndarray, "M H P"]  # Frobenius norm of each matrix
    # exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for a matrix of zeros
    effective_ranks: Float[np.ndarray, "M H P"]
    # norm of the change since the previous position, relative to the previous state's norm; NaN at the first position
    changes: Float[np.ndarray, "M H P"]
    # of each token in each layer that has one: beta (DeltaNet), mean learning rate (LaCT)
    write_strengths: Float[np.ndarray, "L H T"]
    write_layers: tuple[int, ...]  # the layers with write strengths
    long_short: Float[np.ndarray, "T"] | None = None  # of each token, in nats (see `reading.long_short`)


@contextmanager
def written(policy: FastWeightLM) -> Iterator[dict[int, Float[Tensor, "T H"]]]:
    """Records write strengths while the policy reads one row: layer number -> strengths, for layers that have them."""
    with recorded(policy, "write_strengths") as found:
        yield found


@contextmanager
def recorded(policy: FastWeightLM, method: str) -> Iterator[dict[int, Float[Tensor, "T H"]]]:
    """Records what a method of the memory layers returns for their inputs while the policy reads one row.

    `method` is `write_strengths` or `log_gate`. Layers that lack it, or for which it returns None, are left out.
    """
    found: dict[int, Tensor] = {}

    def record(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = getattr(module, method)(arguments[0] if arguments else named["hidden_states"])
        if values is not None:
            found[module.layer_idx] = values[0].detach().float().cpu()

    with ExitStack() as hooks:
        for module in policy.modules():
            if hasattr(module, method):
                hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        yield found


@torch.no_grad()
def summarise(
    trace: Trace, positions: Sequence[int], writes: dict[int, Float[Tensor, "T H"]], fast_weights: Sequence[str]
) -> StateSummary:
    """Summarises the states at increasing positions of the single row of a trace, without re-reading.

    `fast_weights` are the names of the matrices (`FastWeightLM.FAST_WEIGHTS`). Raises ValueError for positions that do
    not increase, and for a state without any of these matrices.
    """
    rising = len(positions) > 0 and all(a < b for a, b in pairwise(positions))
    require(rising, "positions", list(positions)[:5], "increasing, at least one")
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
    norms, ranks, changes = map(stacked, zip(*(_statistics(found[key]) for key in keys), strict=True))
    return StateSummary(
        positions=np.array(positions),
        layers=tuple(layer for layer, _ in keys),
        names=tuple(name for _, name in keys),
        norms=norms,
        effective_ranks=ranks,
        changes=changes,
        write_strengths=stacked([writes[number].T for number in sorted(writes)]),
        write_layers=tuple(sorted(writes)),
    )


def _statistics(states: Float[Tensor, "P H a b"]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns norm, effective rank and change of each head's matrix, [H, P] each."""
    norms = torch.linalg.matrix_norm(states)
    singular = torch.linalg.svdvals(states)
    shares = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    ranks = torch.where(norms > 0, torch.special.entr(shares).sum(-1).exp(), 0)
    changes = torch.full_like(norms, torch.nan)
    changes[1:] = torch.linalg.matrix_norm(states[1:] - states[:-1]) / norms[:-1].clamp(min=1e-30)
    return norms.T.cpu(), ranks.T.cpu(), changes.T.cpu()


def stacked(parts: Sequence[Float[Tensor, "_ _2"]]) -> Float[np.ndarray, "M H P"]:
    """Stacks matrices with different numbers of heads into one array, padded with NaN."""
    if not parts:
        return np.zeros((0, 0, 0), np.float32)
    return pad_sequence(list(parts), batch_first=True, padding_value=torch.nan).numpy()
