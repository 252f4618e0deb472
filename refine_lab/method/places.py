"""Places: the positions in a batch from which rollouts start, for every selection (paper, equations 5 and 6, table 7; ours)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.host import fetch, host
from refine_lab.method.copies import copied_tokens
from refine_lab.method.losses import mask_last
from refine_lab.method.memory import gains, long_short_difference, short_difference
from refine_lab.method.selection import select_positions, weighed
from refine_lab.models.base import FastWeightLM
from refine_lab.rng import Draws
from refine_lab.types import Batch, SelectionFunction, SelectionInputs
from refine_lab.validation import require
from refine_lab.workers import ALONE, Workers


class NotFinite(FloatingPointError):
    """The next-token loss of sequences is NaN or infinite, so nothing can be sampled from them."""

    def __init__(self) -> None:
        super().__init__("the next-token loss is NaN or infinite, so no position can be drawn")


def places(
    policy: FastWeightLM,
    batch: Batch,
    entropies: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B S"] | None,
    refine: RefineConfig,
    draws: Draws,
    selection: SelectionFunction | None = None,
    workers: Workers = ALONE,
) -> Int[Tensor, "B C"]:
    """Draws one position per chunk by the scores of `refine.selection`, [B, C] (see `place_scores`).

    Waits once for the device: the positions and both checks come to the CPU together. Raises `NotFinite` if the sum of
    the `logprobs` is not finite, in all `workers` if it is not in one of them, so that they continue in the same way;
    raises ValueError if a score is not finite.
    """
    scores = place_scores(policy, batch, entropies, logprobs, refine, draws, selection, workers)
    found = weighed(scores, batch.lengths, refine)
    positions = select_positions(found.probabilities, batch.lengths, batch.sequence_ids, draws, refine.num_chunks)
    scores_finite = found.finite.all()
    loss_finite = scores_finite if logprobs is None else workers.every(_finite(logprobs, batch))
    fetch(positions, scores_finite, loss_finite)
    if logprobs is not None and not host(loss_finite):
        raise NotFinite
    if not host(scores_finite):
        found.check(refine)
    return positions


def _finite(logprobs: Float[Tensor, "B S"], batch: Batch) -> Bool[Tensor, ""]:
    return mask_last(logprobs.detach(), batch.lengths).sum().isfinite()


@torch.no_grad()
def place_scores(
    policy: FastWeightLM,
    batch: Batch,
    entropies: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B S"] | None,
    refine: RefineConfig,
    draws: Draws,
    selection: SelectionFunction | None = None,
    workers: Workers = ALONE,
) -> Float[Tensor, "B T"]:
    """Returns the score of each position, from which `selection_probabilities` are computed, [B, T].

    - `entropy`, `uniform`, `argmax`, `argmin`: the entropies.
    - `memory`: the gain in nats (see `gains`), and -inf where the short context of the first token is too short.
    - `copy`: the number of next tokens that can be copied (see `copied_tokens`).
    - `custom`: what the function `selection` returns.

    `logprobs` [B, T - 1] of x_{i+1} given x_{<=i} are needed for `memory` and `custom`; entries beyond a row's end are
    ignored.
    """
    k = refine.rollout_length
    if refine.selection == "copy":
        return copied_tokens(batch.tokens, batch.lengths, refine.window, k)
    if refine.selection not in ("memory", "custom"):
        return entropies
    require(logprobs is not None, "logprobs", None, f"given for selection {refine.selection!r}")
    assert logprobs is not None
    logprobs = logprobs.detach()
    if refine.selection == "memory":
        difference = short_difference(policy, batch, logprobs, refine, draws)
        return gains(difference.nan_to_num(nan=0.0), k).masked_fill(difference.isnan(), -torch.inf)
    require(selection is not None, "selection", None, "a function for RefineConfig.selection 'custom'")
    assert selection is not None
    finite = workers.every(_finite(logprobs, batch))
    if not host(finite):  # a function of the user is not called with numbers that are none
        raise NotFinite
    inputs = SelectionInputs(
        tokens=batch.tokens,
        lengths=batch.lengths,
        entropies=entropies,
        logprobs=F.pad(mask_last(logprobs, batch.lengths), (0, 1)),
        rollout_length=k,
        difference=partial(long_short_difference, policy, batch, logprobs, refine, draws),
    )
    return selection(inputs)
