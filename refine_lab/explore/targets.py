"""Targets of attribution: the log-probability of a continuation after a prefix, or the contrast of two continuations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.method.rollout import Branches
from refine_lab.models import FastWeightLM
from refine_lab.training.adaptation import padded_batch
from refine_lab.validation import require


@dataclass(frozen=True, kw_only=True)
class Target:
    """log p(`token_ids` | prefix), where `position` is that of the prefix's last token, in nats.

    With `against`, another continuation, it is the contrast log p(`token_ids`) - log p(`against`).
    """

    position: int
    token_ids: tuple[int, ...]
    against: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.position >= 1, "position", self.position, "at least 1")
        require(len(self.token_ids) > 0, "the target's tokens", "none", "at least one")


@dataclass(frozen=True, eq=False)
class TargetScores:
    """The target's value in R branches, in nats, and whether greedy decoding would produce its tokens."""

    logprobs: Float[Tensor, "R"]
    greedy: Bool[Tensor, "R"]


def score_target(policy: FastWeightLM, branches: Branches, target: Target) -> TargetScores:
    """Returns the target's value after each of R prefixes, whose states are `branches`; differentiable in the states."""
    logprobs, greedy = _continuation(policy, branches, target.token_ids)
    if target.against:
        logprobs = logprobs - _continuation(policy, branches, target.against)[0]
    return TargetScores(logprobs, greedy)


def prefix_of(policy: FastWeightLM, token_ids: Int[Tensor, "T"], target: Target) -> Int[Tensor, "1 _"]:
    """Returns the prefix that ends at the target's position as a batch on the model's device.

    Raises ValueError for a position outside the document, and for target tokens that are not in the vocabulary.
    """
    last, vocabulary = len(token_ids) - 1, policy.head.out_features
    require(target.position <= last, "position", target.position, f"from 1 to {last}")
    outside = [token for token in (*target.token_ids, *target.against) if not 0 <= token < vocabulary]
    require(not outside, "a target token", outside[:1], f"from 0 to {vocabulary - 1}")
    return padded_batch(policy, [token_ids[: target.position + 1]]).tokens


@contextmanager
def frozen(policy: FastWeightLM) -> Iterator[None]:
    """Enables gradients, but none of the parameters: a backward pass then computes and stores nothing for them."""
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _continuation(policy: FastWeightLM, branches: Branches, token_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns log p of the tokens after each branch, [R], and whether each of them is the most probable one, [R]."""
    hidden = branches.hidden_states.unsqueeze(1)
    tokens = torch.tensor(token_ids, device=hidden.device).expand(len(hidden), -1)
    if len(token_ids) > 1:
        hidden = torch.cat([hidden, policy.read(tokens[:, :-1], state=branches.state).hidden_states], 1)
    stats = policy.head(hidden, tokens, entropy=False)
    return stats.logprobs.sum(-1), stats.is_top1.all(-1)
