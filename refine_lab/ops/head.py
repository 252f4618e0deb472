"""The language-model head in slices: logprob, entropy and top-1 match of every token without the full logits.

No tensor over the vocabulary has more than `HEAD_ROWS` rows, forward or backward: the backward pass recomputes each
slice's logits from the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.ops.kernels import Grads, Ids, Logits, PerRow, chosen

HEAD_ROWS = 1024


class TokenStats(NamedTuple):
    """Per token x, under its hidden state's distribution p: log p(x), the entropy of p in nats, and whether x = argmax p."""

    logprobs: Float[Tensor, "R"]
    entropies: Float[Tensor, "R"]
    is_top1: Bool[Tensor, "R"]


def token_stats(
    hidden_states: Float[Tensor, "R D"],
    weight: Float[Tensor, "V D"],
    token_ids: Int[Tensor, "R"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
) -> TokenStats:
    """Returns logprob, entropy and top-1 match of `token_ids` under softmax((W h + b) / temperature).

    Gradients flow from logprobs and entropies to hidden states, weight and bias. If `entropy` is False, the entropies
    are zeros and cost nothing.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # so that the backward makes the very same logits again
        return TokenStats(*_SlicedHead.apply(hidden_states, weight, bias, token_ids, temperature, entropy))


def row_statistics(
    logits: Logits, token_ids: Ids, temperature: float, entropy: bool
) -> tuple[PerRow, PerRow, Bool[Tensor, "S"]]:
    """Returns log p(x), entropy (zeros if not requested) and x = argmax p of every row; may overwrite the logits."""
    logits = _tempered(logits, temperature)
    target = logits.gather(-1, token_ids.unsqueeze(-1))
    highest = logits.amax(-1, keepdim=True)
    is_top1 = target == highest
    logits -= highest
    weights = logits.exp()
    total = weights.sum(-1, keepdim=True)
    logprobs, entropies = target - highest - total.log(), torch.zeros_like(target)
    if entropy:
        mean = torch.linalg.vecdot(weights, logits).unsqueeze(-1) / total
        entropies = total.log() - mean
    return logprobs.squeeze(-1), entropies.squeeze(-1), is_top1.squeeze(-1)


def logit_gradients_(
    logits: Logits, token_ids: Ids, logprobs: PerRow, entropies: PerRow, grads: Grads, temperature: float
) -> Logits:
    """Returns the gradient of the logits, in their dtype; overwrites the logits.

    `grads` are the gradients of logprobs and entropies; None is a gradient of zeros.

    d log p_x / dz = 1_x - p,   dH / dz = -p (log p + H),   z = logits / temperature
    """
    dtype, target, (grad_logprobs, grad_entropies) = logits.dtype, token_ids.unsqueeze(-1), grads
    logits = _tempered(logits, temperature)
    log_normaliser = logits.gather(-1, target) - logprobs.unsqueeze(-1)
    grad_lp = (torch.zeros_like(logprobs) if grad_logprobs is None else grad_logprobs).unsqueeze(-1)
    logits -= log_normaliser
    if grad_entropies is not None:
        grad = (logits + entropies.unsqueeze(-1)).mul_(grad_entropies.unsqueeze(-1)).add_(grad_lp).neg_()
        grad.mul_(logits.exp_())
    else:
        grad = logits.exp_().mul_(-grad_lp)
    return grad.scatter_add_(-1, target, grad_lp).div_(temperature).to(dtype)


def _tempered(logits: Logits, temperature: float) -> Logits:
    """Returns z = logits / temperature in at least float32, in place where possible."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return logits if temperature == 1.0 else logits.div_(temperature)


def _on_slices(x: Tensor) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """Returns `row_statistics` and `logit_gradients_`, or the kernels of the same names if they are enabled."""
    if not chosen("head", x):
        return row_statistics, logit_gradients_
    from refine_lab.ops.kernels import head as kernels  # binds Triton: imported where it is used

    return kernels.row_statistics, kernels.logit_gradients_


class _SlicedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, token_ids, temperature, with_entropy):
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        weight, (statistics, _) = weight.to(hidden_states.dtype), _on_slices(hidden_states)
        bias = None if bias is None else bias.to(hidden_states.dtype)
        empty = hidden_states.new_zeros(0, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        parts = [(empty, empty, empty.bool())]
        for start in range(0, len(token_ids), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = F.linear(hidden_states[rows], weight, bias)
            parts.append(statistics(logits, token_ids[rows], temperature, with_entropy))
        logprobs, entropies, is_top1 = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_states, weight, bias, token_ids, logprobs, entropies)
        ctx.mark_non_differentiable(is_top1)
        return logprobs, entropies, is_top1

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies, _):
        hidden_states, weight, bias, token_ids, logprobs, entropies = ctx.saved_tensors
        _, gradients_ = _on_slices(hidden_states)
        grad_hidden, grad_weight = torch.empty_like(hidden_states), torch.zeros_like(weight, dtype=logprobs.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=logprobs.dtype)
        for start in range(0, len(token_ids), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = F.linear(hidden_states[rows], weight, bias)
            grads = tuple(None if x is None else x[rows] for x in (grad_logprobs, grad_entropies))
            grad = gradients_(logits, token_ids[rows], logprobs[rows], entropies[rows], grads, ctx.temperature)
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight += grad.T @ hidden_states[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None
