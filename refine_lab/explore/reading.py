"""Per-token statistics of a document under a model, computed in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.method.memory import short_difference
from refine_lab.models import FastWeightLM, Trace
from refine_lab.ops.head import HEAD_ROWS
from refine_lab.rng import Draws
from refine_lab.training.adaptation import padded_batch
from refine_lab.training.key_tokens import short_contexts

ALTERNATIVES = 5
"""Number of most probable tokens stored for each position."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DocumentReading:
    """Statistics of each token of a document given all tokens before it; the first has NaN values and rank 0.

    Entry i belongs to token i: `entropies[i]` is the entropy of pi(. | x_{<i}), which `selection` calls H_{i-1} (eq.
    5).
    """

    token_ids: Int[np.ndarray, "T"]
    entropies: Float[np.ndarray, "T"]  # entropy of the policy before the token, in nats
    logprobs: Float[np.ndarray, "T"]  # of the token itself, in nats; the next-token loss is its negative
    ranks: Int[np.ndarray, "T"]  # rank of the token by probability, from 1
    alternatives: Int[np.ndarray, "T A"]  # the most probable tokens at this position, in descending order
    probabilities: Float[np.ndarray, "T A"]  # probabilities of the alternatives
    # how much better each token is predicted from all tokens before it than from the last ones (see `long_short`), in nats
    long_short: Float[np.ndarray, "T"] | None = None
    version: str = ""  # identifies the weights that were used (see `adapted.LoadedModel`)

    @property
    def losses(self) -> Float[np.ndarray, "T"]:
        """Returns the next-token loss of each token, in nats."""
        return -self.logprobs


@torch.no_grad()
def read_document(
    policy: FastWeightLM, token_ids: Int[Tensor, "T"], *, alternatives: int = ALTERNATIVES
) -> tuple[DocumentReading, Trace]:
    """Reads a document once; returns each token's statistics, and the trace from which rollouts can branch anywhere.

    Raises ValueError for an input that is not a row of at least two token ids of the vocabulary, or exceeds the model's
    context.
    """
    batch = padded_batch(policy, [token_ids])
    trace = policy.read(batch.tokens, batch.lengths)
    return statistics_of(policy, trace, token_ids, alternatives=alternatives), trace


@torch.no_grad()
def statistics_of(
    policy: FastWeightLM, trace: Trace, token_ids: Int[Tensor, "T"], *, alternatives: int = ALTERNATIVES
) -> DocumentReading:
    """Returns the statistics of each token of a document from its trace, one row."""
    count, tokens = min(alternatives, policy.head.out_features), token_ids.to(policy.device)
    pairs = zip(trace.hidden_states[0, :-1].split(HEAD_ROWS), tokens[1:].split(HEAD_ROWS), strict=True)
    parts = [_statistics(policy.head(hidden), following, count) for hidden, following in pairs]
    entropies, logprobs, ranks, best, probabilities = (
        torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
    )
    return DocumentReading(
        token_ids=token_ids.cpu().numpy().astype(np.int32),
        entropies=np.insert(entropies, 0, np.nan),
        logprobs=np.insert(logprobs, 0, np.nan),
        ranks=np.insert(ranks, 0, 0),
        alternatives=np.insert(best, 0, 0, axis=0),
        probabilities=np.insert(probabilities, 0, np.nan, axis=0),
    )


@torch.no_grad()
def long_short(policy: FastWeightLM, reading: DocumentReading) -> Float[np.ndarray, "T"] | None:
    """Returns the long-short difference of each token in nats, from 0 to `memory.MOST`, by another reading in windows.

        log p(x_i | x_{<i}) - log p(x_i | the last w to 2 w - 1 tokens of x_{<i})

    w is that of `key_tokens.short_contexts`. A token with fewer than 2 w tokens before it is not compared and has NaN;
    None if that holds for all. No trace is kept. Source: LongPPL (Fang et al., 2024; arXiv 2410.23771).
    """
    refine = short_contexts(policy)
    first = 2 * refine.window
    if len(reading.token_ids) <= first:
        return None
    batch = padded_batch(policy, [torch.from_numpy(reading.token_ids).long()])
    logprobs = torch.from_numpy(reading.logprobs[None, 1:]).to(policy.device)
    difference = short_difference(policy, batch, logprobs, refine, Draws(seed=0))  # windows draw nothing
    found = np.insert(difference[0, :-1].float().cpu().numpy(), 0, np.nan)
    found[:first] = np.nan
    return found


def _statistics(logits: Float[Tensor, "S V"], tokens: Int[Tensor, "S"], count: int) -> tuple[Tensor, ...]:
    """Returns entropy, logprob, rank and best alternatives at some positions."""
    logprobs = logits.float().log_softmax(-1)
    logprob = logprobs.gather(-1, tokens.unsqueeze(-1))
    probabilities = logprobs.exp()
    entropies = -torch.linalg.vecdot(probabilities, logprobs.clamp(min=torch.finfo(logprobs.dtype).min))
    best = probabilities.topk(count, -1)
    ranks = (logprobs > logprob).sum(-1, dtype=torch.int32) + 1
    return entropies, logprob.squeeze(-1), ranks, best.indices.int(), best.values
