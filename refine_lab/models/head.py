"""The language-model head as a module: what is computed from its weight is computed here and in nowhere else.

LoRA, a bias, sharding (FSDP2) and hooks act on a module when it is called. So the rest of the package calls the head, and never
reads its weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refine_lab.ops.head import HEAD_ROWS, TokenStats, token_stats


class Head(nn.Linear):
    """A linear head whose forward gives the logits, or the statistics of given tokens without keeping any logits."""

    @staticmethod
    def of(linear: nn.Linear) -> Head:
        """The head that shares the parameters of `linear`."""
        head = Head(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "*rows D"],
        ids: Int[Tensor, "*rows"] | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> Float[Tensor, "*rows V"] | TokenStats:
        """The logits W h + b; with `ids`, the `TokenStats` of these tokens under softmax((W h + b) / temperature).

        The statistics are differentiable. Without `entropy` the entropies are zeros.
        """
        if ids is None:
            bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
            return F.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)
        flat = hidden_states.flatten(0, -2), self.weight, ids.flatten()
        stats = token_stats(*flat, bias=self.bias, temperature=temperature, entropy=entropy)
        return TokenStats(*(x.view(ids.shape) for x in stats))


class WrappedHead(nn.Module):
    """Called as a `Head` is, around any module that gives logits, such as a linear layer that PEFT has wrapped."""

    def __init__(self, module: Any, vocabulary: int) -> None:
        super().__init__()
        self.module = module
        self.out_features: int = getattr(module, "out_features", vocabulary)  # most of PEFT's layers have it

    def forward(
        self,
        hidden_states: Float[Tensor, "*rows D"],
        ids: Int[Tensor, "*rows"] | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> Float[Tensor, "*rows V"] | TokenStats:
        """As `Head.forward`. The backward computes the logits again, at most `HEAD_ROWS` rows at once."""
        if ids is None:
            return self.module(hidden_states)
        slices = zip(hidden_states.flatten(0, -2).split(HEAD_ROWS), ids.flatten().split(HEAD_ROWS), strict=True)
        parts = [
            checkpoint(self._statistics, rows, tokens, temperature, entropy, use_reentrant=False)
            for rows, tokens in slices
        ]
        return TokenStats(*(torch.cat(column).view(ids.shape) for column in zip(*parts, strict=True)))

    def _statistics(self, rows: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> TokenStats:
        logits = self.module(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logprobs = logits.log_softmax(-1)
        found = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        entropies = torch.zeros_like(found)
        if entropy:
            entropies = -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp(min=torch.finfo(logprobs.dtype).min))
        is_top1 = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) == logits.amax(-1)
        return TokenStats(found, entropies, is_top1)
