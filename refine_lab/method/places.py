"""Places: the positions in a batch from which rollouts start, for every selection (paper, equations 5 and 6, table 7; ours)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.method.copies import copied_tokens
from refine_lab.method.losses import mask_last
from refine_lab.method.memory import gains, long_short_difference, short_difference
from refine_lab.method.selection import select_positions, selection_probabilities
from refine_lab.models.base import FastWeightLM
from refine_lab.rng import Draws
from refine_lab.types import Batch, SelectionFunction, SelectionInputs
from refine_lab.validation import require


def places(
    policy: FastWeightLM,
    batch: Batch,
    entropies: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B S"] | None,
    refine: RefineConfig,
    draws: Draws,
    selection: SelectionFunction | None = None,
) -> Int[Tensor, "B C"]:
    """Draws one position per chunk by the scores of `refine.selection`, [B, C] (see `place_scores`)."""
    scores = place_scores(policy, batch, entropies, logprobs, refine, draws, selection)
    probabilities = selection_probabilities(scores, batch.lengths, refine)
    return select_positions(probabilities, batch.lengths, batch.sequence_ids, draws, refine.num_chunks)


@torch.no_grad()
def place_scores(
    policy: FastWeightLM,
    batch: Batch,
    entropies: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B S"] | None,
    refine: RefineConfig,
    draws: Draws,
    selection: SelectionFunction | None = None,
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
    inputs = SelectionInputs(
        tokens=batch.tokens,
        lengths=batch.lengths,
        entropies=entropies,
        logprobs=F.pad(mask_last(logprobs, batch.lengths), (0, 1)),
        rollout_length=k,
        difference=partial(long_short_difference, policy, batch, logprobs, refine, draws),
    )
    return selection(inputs)
