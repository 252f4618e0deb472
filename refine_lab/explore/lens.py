"""Layer lens: what each layer's residual stream would predict through the final norm and the head.

The method is known as the logit lens (nostalgebraist, 2020). It needs no training and shows after which layer a
prediction is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.models import FastWeightLM, Trace
from refine_lab.validation import require

ALTERNATIVES = 5
"""Number of most probable tokens returned for each layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerLens:
    """The prediction of the token after `position` from S residual streams: after the embedding and after each layer."""

    position: int
    token: int  # the token whose probability is followed
    logprobs: Float[np.ndarray, "S"]  # of the token, in nats
    ranks: Int[np.ndarray, "S"]  # of the token, from 1
    alternatives: Int[np.ndarray, "S A"]  # the most probable tokens, in descending order
    probabilities: Float[np.ndarray, "S A"]


@torch.no_grad()
def layer_lens(
    policy: FastWeightLM,
    trace: Trace,
    token_ids: Int[Tensor, "T"],
    position: int,
    token: int | None = None,
    alternatives: int = ALTERNATIVES,
) -> LayerLens:
    """Returns the lens at a position of a document, by reading one token from the state before it.

    `trace` is that of the document, one row. `token` is the followed token; None: the document's next one.

    Raises ValueError for a position outside the document, no token to follow, and a model without a final norm.
    """
    last, vocabulary = len(token_ids) - 1, policy.head.out_features
    require(0 <= position <= last, "position", position, f"from 0 to {last}")
    if token is None:
        require(position < last, "position", position, f"from 0 to {last - 1}, where a token follows")
        token = int(token_ids[position + 1])
    require(0 <= token < vocabulary, "the followed token", token, f"from 0 to {vocabulary - 1}")
    norm = getattr(policy.model, "norm", None)
    require(norm is not None, "the model's family", policy.config.model_type, "one with a final norm named `norm`")
    assert norm is not None
    state = trace.state_at(torch.tensor([[position - 1]], device=policy.device)) if position else None
    inputs: list[Tensor] = []
    embedded = policy.get_input_embeddings()(token_ids[position : position + 1].to(policy.device).unsqueeze(0))
    final = policy.read_embeddings(embedded, None, state, inputs).hidden_states
    streams = torch.cat([*(norm(x) for x in inputs), final])[:, 0]
    logprobs = policy.head(streams).float().log_softmax(-1)
    followed = logprobs[:, token]
    best = logprobs.exp().topk(min(alternatives, vocabulary), -1)
    return LayerLens(
        position=position,
        token=token,
        logprobs=followed.cpu().numpy(),
        ranks=((logprobs > followed.unsqueeze(-1)).sum(-1) + 1).cpu().numpy(),
        alternatives=best.indices.cpu().numpy(),
        probabilities=best.values.cpu().numpy(),
    )
