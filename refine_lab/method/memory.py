"""Selection by memory: how much better the next tokens are predicted from the whole prefix than from its last tokens.

The long-short difference is the criterion of LongPPL and LongCE (Fang et al., 2024; arXiv 2410.23771). It finds the
places where a prediction needs what the fast weights hold, without labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.host import derived, host, indices
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import hidden_states_only
from refine_lab.rng import Draws
from refine_lab.types import Batch
from refine_lab.validation import require
from refine_lab.workers import is_sharded

MOST = 5.0
"""Upper bound of the long-short difference of a token, in nats: one surprising token does not outweigh all others."""


@torch.no_grad()
def long_short_difference(
    policy: FastWeightLM,
    batch: Batch,
    logprobs: Float[Tensor, "B S"],
    refine: RefineConfig,
    draws: Draws,
) -> Float[Tensor, "B T"]:
    """log p(x_{i+1} | x_{<=i}) - log p(x_{i+1} | the last tokens alone) in nats at index i, clamped to [0, `MOST`], [B, T].

    `logprobs` [B, T - 1] are those of x_{i+1} given x_{<=i}; entries beyond a row's end are ignored. The difference is 0
    where it is not known (see `short_logprobs`), and where the whole prefix is a short context: in the first w tokens, or
    with `windows` in the first 2 w - 1. In a shorter row, and in a chunk within these tokens, all positions are equal.
    Raises ConfigError if w is smaller than the attention window of the policy.
    """
    require_window(refine, type(policy), policy.config)
    return short_difference(policy, batch, logprobs, refine, draws).nan_to_num(nan=0.0)


def short_difference(
    policy: FastWeightLM, batch: Batch, logprobs: Float[Tensor, "B S"], refine: RefineConfig, draws: Draws
) -> Float[Tensor, "B T"]:
    """Returns the difference of `long_short_difference`, with NaN where the short context is too short to be compared."""
    short, whole = short_logprobs(policy, batch, refine, draws)
    index = torch.arange(short.shape[1], device=short.device)
    none = (index < whole) | (index >= batch.lengths.unsqueeze(1) - 1)
    return torch.where(none, 0, (F.pad(logprobs.detach(), (0, 1)) - short).clamp(0, MOST))


def gains(difference: Float[Tensor, "B T"], rollout_length: int) -> Float[Tensor, "B T"]:
    """The gain of position t: the sum of the long-short differences of the k tokens x_{t+1..t+k}, in nats, [B, T].

    gain(t) = difference(t) + ... + difference(t + k - 1), with 0 beyond the last column.
    """
    return F.pad(difference, (0, rollout_length - 1)).unfold(1, rollout_length, 1).sum(-1)


def check_window(refine: RefineConfig | None, model: type[FastWeightLM], config: Any) -> None:
    """Raises ConfigError if short contexts are shorter than the attention window of a model with `config`."""
    if refine is not None and refine.reads_short_contexts:
        require_window(refine, model, config)


def require_window(refine: RefineConfig, model: type[FastWeightLM], config: Any) -> None:
    """Raises ConfigError if `refine.window` is smaller than the attention window of a model with `config`."""
    least = model.attention_window(config)
    require(refine.window >= least, "RefineConfig.window", refine.window, f"at least {least}, the model's window")


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of a batch's rows that are read by themselves, P in all, and which of their predictions are used.

    A piece begins at token `start` of row `row`; its predictions from offset `first` on are used.
    """

    rows: Int[Tensor, "P"]
    starts: Int[Tensor, "P"]
    span: int
    first: int
    whole: int
    "Predictions before this index are not compared: their whole prefix is a short context."


def pieces(batch: Batch, refine: RefineConfig, draws: Draws) -> Pieces:
    """Divides every row into pieces of w = `refine.window` tokens, or of 2 w - 1.

    `segments`: disjoint pieces of w tokens from a random token in 1..w on, keyed by sequence id. The predictions of a
    piece's first quarter are not used, so that contexts have w / 4 to w tokens.
    `windows`: pieces of 2 w - 1 tokens, w apart, of which the last w predictions are used: contexts of w to 2 w - 1 tokens.
    """
    w, device, lengths = refine.window, batch.tokens.device, host(batch.lengths)
    if refine.short_contexts == "segments":
        uniforms = draws.uniforms(batch.sequence_ids, "segments", (1,)).squeeze(1)
        begin, span, first, whole = 1 + (uniforms * w).long(), w, -(-w // 4) - 1, w
    else:
        begin, span, first, whole = torch.full_like(lengths, w), 2 * w - 1, w - 1, 2 * w - 1
    count = ((lengths - 2 - first - begin) // w + 1).clamp(min=0)
    count = torch.where(lengths - 1 > whole, count, 0)
    number = torch.arange(int(count.max()))
    rows, numbers = (number < count.unsqueeze(1)).nonzero(as_tuple=True)
    return Pieces(indices(rows, device), indices(begin[rows] + numbers * w, device), span, first, whole)


@torch.no_grad()
def short_logprobs(
    policy: FastWeightLM, batch: Batch, refine: RefineConfig, draws: Draws
) -> tuple[Float[Tensor, "B T"], int]:
    """Returns log p(x_{i+1} | the last tokens alone) at index i, NaN where not known, and `Pieces.whole`.

    All pieces are read in one batch, from an empty state, in the caller's arithmetic; no state is kept.
    """
    cut = pieces(batch, refine, draws)
    short = torch.full(batch.tokens.shape, torch.nan, device=batch.tokens.device)
    if not len(cut.rows):
        if is_sharded(policy):  # other workers may read pieces, and all gather the weights together
            with hidden_states_only():
                policy.head(policy.read(batch.tokens[:1, :1]).hidden_states[:, 0])
        return short, cut.whole
    offsets = torch.arange(cut.span, device=short.device)
    index = cut.starts.unsqueeze(1) + offsets
    lengths = derived(
        lambda lengths, rows, starts: (lengths[rows] - starts).clamp(max=cut.span), batch.lengths, cut.rows, cut.starts
    )
    tokens = batch.tokens[cut.rows.unsqueeze(1), index.clamp(max=batch.tokens.shape[1] - 1)]
    tokens = torch.where(offsets < lengths.unsqueeze(1), tokens, 0)
    with hidden_states_only():
        hidden = policy.read(tokens, lengths).hidden_states

    def used(lengths: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        offsets = torch.arange(cut.span, device=starts.device)
        return (offsets >= cut.first) & (starts.unsqueeze(1) + offsets + 1 < lengths[rows].unsqueeze(1))

    predicted = host(derived(used, batch.lengths, cut.rows, cut.starts)).nonzero(as_tuple=True)
    piece, offset = (indices(x, short.device) for x in predicted)
    row, place = cut.rows[piece], cut.starts[piece] + offset
    stats = policy.head(hidden[piece, offset], batch.tokens[row, place + 1], entropy=False)
    short = short.to(stats.logprobs.dtype)
    short[row, place] = stats.logprobs
    return short, cut.whole
