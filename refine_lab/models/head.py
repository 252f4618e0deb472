"""The language-model head as a module, the only place where its weight is used.

LoRA, a bias, sharding (FSDP2) and hooks take effect when a module is called. Therefore the rest of the package calls
the head and never reads its weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refine_lab.ops.head import HEAD_ROWS, TokenStats, token_stats
from refine_lab.ops.precision import wide


class StatisticsHead(nn.Module):
    """The head's interface: returns logits, or statistics of given tokens without storing logits.

    A subclass defines `logits` of hidden states [*rows, D], and `statistics` of hidden states [R, D] and ids [R].
    """

    logits: Any
    statistics: Any

    def forward(
        self,
        hidden_states: Float[Tensor, "*rows D"],
        ids: Int[Tensor, "*rows"] | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> Float[Tensor, "*rows V"] | TokenStats:
        """Returns the logits W h + b; with `ids`, the `TokenStats` of these tokens under softmax((W h + b) / temperature).

        The statistics are differentiable. If `entropy` is False, the entropies are zeros.
        """
        if ids is None:
            return self.logits(hidden_states)
        stats = self.statistics(hidden_states.flatten(0, -2), ids.flatten(), temperature, entropy)
        return TokenStats(*(x.view(ids.shape) for x in stats))


class Head(StatisticsHead, nn.Linear):
    """A linear head."""

    @staticmethod
    def of(linear: nn.Linear) -> Head:
        """Returns a head that shares the parameters of `linear`."""
        head = Head(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def logits(self, hidden_states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)

    def statistics(
        self, hidden_states: Float[Tensor, "R D"], ids: Int[Tensor, "R"], temperature: float, entropy: bool
    ) -> TokenStats:
        return token_stats(hidden_states, self.weight, ids, bias=self.bias, temperature=temperature, entropy=entropy)


class WrappedHead(StatisticsHead):
    """A head around any module that returns logits, such as a linear layer wrapped by PEFT.

    The backward pass recomputes the logits, at most `HEAD_ROWS` rows at once.
    """

    def __init__(self, module: Any, vocabulary: int) -> None:
        super().__init__()
        self.module = module
        self.out_features: int = getattr(module, "out_features", vocabulary)  # most of PEFT's layers have it

    def logits(self, hidden_states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        return self.module(hidden_states)

    def statistics(
        self, hidden_states: Float[Tensor, "R D"], ids: Int[Tensor, "R"], temperature: float, entropy: bool
    ) -> TokenStats:
        parts = [
            checkpoint(self._slice, rows, tokens, temperature, entropy, use_reentrant=False)
            for rows, tokens in zip(hidden_states.split(HEAD_ROWS), ids.split(HEAD_ROWS), strict=True)
        ]
        return TokenStats(*map(torch.cat, zip(*parts, strict=True)))

    def _slice(self, rows: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> TokenStats:
        logits, index = self.module(rows), tokens.unsqueeze(-1)
        logits = logits.to(wide(logits)) / temperature
        logprobs = logits.log_softmax(-1)
        found = logprobs.gather(-1, index).squeeze(-1)
        entropies = torch.zeros_like(found)
        if entropy:
            entropies = -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp(min=torch.finfo(logprobs.dtype).min))
        return TokenStats(found, entropies, logits.gather(-1, index).squeeze(-1) == logits.amax(-1))
