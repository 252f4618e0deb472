"""What a model makes of a document, token by token, in one reading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import Trace
from refine_lab.ops.head import HEAD_ROWS
from refine_lab.training.adaptation import prompt_batch

ALTERNATIVES = 5
"""Most probable tokens that are kept of each place."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DocumentReading:
    """Of each token of a document given all before it; nothing is known of the first, whose numbers are NaN and rank 0.

    Entry i is about token i: `entropies[i]` is the entropy of pi(. | x_{<i}), which `selection` calls H_{i-1} (eq. 5).
    """

    token_ids: Int[np.ndarray, "T"]
    entropies: Float[np.ndarray, "T"]
    "In nats."
    logprobs: Float[np.ndarray, "T"]
    "log p of the token itself, in nats; the next-token loss is its negative."
    ranks: Int[np.ndarray, "T"]
    "Place of the token among all by probability, from 1."
    alternatives: Int[np.ndarray, "T A"]
    "The most probable tokens there, the first of them first."
    probabilities: Float[np.ndarray, "T A"]
    "Theirs."
    version: str = ""
    "Names the weights that read (see `session.Held`)."

    @property
    def losses(self) -> Float[np.ndarray, "T"]:
        """Next-token loss of each token, in nats."""
        return -self.logprobs


@torch.no_grad()
def read_document(
    policy: FastWeightLM, token_ids: Int[Tensor, "T"], *, alternatives: int = ALTERNATIVES
) -> tuple[DocumentReading, Trace]:
    """Read a document once: what is known of each token, and the trace that rollouts branch from anywhere.

    Raises ValueError for what is no row of at least two tokens of the vocabulary, or longer than the model reads.
    """
    batch = prompt_batch(policy, [token_ids])
    trace = policy.read(batch.tokens, batch.lengths)
    count = min(alternatives, policy.head.out_features)
    parts = [
        _statistics(policy.head(hidden), following, count)
        for hidden, following in zip(
            trace.hidden_states[0, :-1].split(HEAD_ROWS), batch.tokens[0, 1:].split(HEAD_ROWS), strict=True
        )
    ]
    entropies, logprobs, ranks, best, probabilities = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    reading = DocumentReading(
        token_ids=token_ids.cpu().numpy().astype(np.int32),
        entropies=_after_first(entropies, np.nan),
        logprobs=_after_first(logprobs, np.nan),
        ranks=_after_first(ranks, 0),
        alternatives=_after_first(best, 0),
        probabilities=_after_first(probabilities, np.nan),
    )
    return reading, trace


def _statistics(logits: Float[Tensor, "S V"], tokens: Int[Tensor, "S"], count: int) -> tuple[Tensor, ...]:
    """Entropy, logprob, rank and the best alternatives of some places."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1))
    probabilities = logprobs.exp()
    entropies = -torch.linalg.vecdot(probabilities, logprobs.clamp(min=torch.finfo(logprobs.dtype).min))
    best = probabilities.topk(count, -1)
    ranks = (logprobs > own).sum(-1, dtype=torch.int32) + 1
    return entropies, own.squeeze(-1), ranks, best.indices.int(), best.values


def _after_first(values: Tensor, first: int | float) -> np.ndarray:
    """The values of tokens 1 and later, with `first` before them."""
    array = values.numpy()
    return np.concatenate([np.full((1, *array.shape[1:]), first, array.dtype), array])
