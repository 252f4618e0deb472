"""The language-model head in slices: logprob, entropy and greedy match of every token, never the whole logits.

No tensor over the vocabulary has more than `HEAD_ROWS` rows, forward or backward: the backward makes each slice's logits
again from the hidden states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HEAD_ROWS = 1024


class TokenStats(NamedTuple):
    """Of each token x given its hidden state's distribution p: log p(x), the entropy of p in nats, whether x = argmax p."""

    logprobs: Float[Tensor, "R"]
    entropies: Float[Tensor, "R"]
    greedy: Bool[Tensor, "R"]


def token_stats(
    hidden_states: Float[Tensor, "R D"],
    weight: Float[Tensor, "V D"],
    token_ids: Int[Tensor, "R"],
    *,
    temperature: float = 1.0,
    entropy: bool = True,
) -> TokenStats:
    """Logprob, entropy and greedy match of `token_ids` under softmax(W h / temperature).

    Gradients flow from logprobs and entropies to hidden states and weight. With `entropy` False the entropies are zeros
    and cost nothing.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # so that the backward makes the very same logits again
        return TokenStats(*_SlicedHead.apply(hidden_states, weight, token_ids, temperature, entropy))


def _slice_logits(hidden_states: Tensor, weight: Tensor, start: int, temperature: float) -> Tensor:
    logits = hidden_states[start : start + HEAD_ROWS] @ weight.T
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return logits if temperature == 1.0 else logits.div_(temperature)


class _SlicedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, token_ids, temperature, with_entropy):
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        weight = weight.to(hidden_states.dtype)
        logprobs, entropies, greedy = [], [], []
        for start in range(0, len(token_ids), HEAD_ROWS):
            logits = _slice_logits(hidden_states, weight, start, temperature)
            target = logits.gather(-1, token_ids[start : start + HEAD_ROWS, None])
            highest = logits.amax(-1, keepdim=True)
            greedy.append((target == highest).squeeze(-1))
            logits -= highest
            weights = logits.exp()
            total = weights.sum(-1, keepdim=True)
            logprobs.append((target - highest - total.log()).squeeze(-1))
            if with_entropy:
                mean = torch.linalg.vecdot(weights, logits).unsqueeze(-1) / total
                entropies.append((total.log() - mean).squeeze(-1))
            else:
                entropies.append(torch.zeros_like(logprobs[-1]))
        empty = hidden_states.new_zeros(0)
        logprobs, entropies = torch.cat([empty, *logprobs]), torch.cat([empty, *entropies])
        greedy = torch.cat([empty.bool(), *greedy])
        ctx.save_for_backward(hidden_states, weight, token_ids, logprobs, entropies)
        ctx.mark_non_differentiable(greedy)
        return logprobs, entropies, greedy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies, _):
        hidden_states, weight, token_ids, logprobs, entropies = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden_states), torch.zeros_like(weight, dtype=logprobs.dtype)
        for start in range(0, len(token_ids), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = _slice_logits(hidden_states, weight, start, ctx.temperature)
            target = token_ids[rows, None]
            log_normaliser = logits.gather(-1, target) - logprobs[rows, None]
            grad_lp = torch.zeros_like(log_normaliser) if grad_logprobs is None else grad_logprobs[rows, None]
            if grad_entropies is not None:  # d log p_x / dz = 1_x - p,  dH / dz = -p (log p + H)
                logits -= log_normaliser
                grad = (logits + entropies[rows, None]).mul_(grad_entropies[rows, None]).add_(grad_lp).neg_()
                grad.mul_(logits.exp_())
            else:
                grad = logits.sub_(log_normaliser).exp_().mul_(-grad_lp)
            grad.scatter_add_(-1, target, grad_lp)
            grad = grad.div_(ctx.temperature).to(hidden_states.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight += grad.T @ hidden_states[rows]
        return grad_hidden, grad_weight, None, None, None
