"""Statistics of a slice of logits, and their gradients in place, in one pass each.

The products with the head's weight stay in cuBLAS, which is fastest; these kernels save the dozen passes that torch
makes over each slice of float32 logits. The torch references are `row_statistics` and `logit_gradients_` of
`refine_lab.ops.head`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from refine_lab.ops.kernels import Grads, Ids, Logits, PerRow
from refine_lab.ops.kernels.language import constexpr, jit, tl, triton

BLOCK = 4096
"""Logits of a row that a program processes at once."""


@jit
def _statistics(
    logits, token_ids, logprobs, entropies, is_top1, width, TEMPERATURE: constexpr, ENTROPY: constexpr, BLOCK: constexpr
):
    TYPE: constexpr = logprobs.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(logits + tl.load(token_ids + row)).to(TYPE) / TEMPERATURE
    highest = tl.full([], float("-inf"), TYPE)  # m, the largest logit so far
    total = tl.zeros([], TYPE)  # sum of exp(z - m)
    moment = tl.zeros([], TYPE)  # sum of exp(z - m) (z - m)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        z = tl.load(logits + column, mask=inside, other=float("-inf")).to(TYPE) / TEMPERATURE
        higher = tl.maximum(highest, tl.max(z, 0))
        shift = tl.where(highest == float("-inf"), 0.0, highest - higher)  # at the first block the sums are zero
        if ENTROPY:
            moment = (moment + total * shift) * tl.exp(shift)
        total = total * tl.exp(shift)
        z = tl.where(inside, z - higher, 0.0)
        weight = tl.where(inside, tl.exp(z), 0.0)
        total += tl.sum(weight, 0)
        if ENTROPY:
            moment += tl.sum(weight * z, 0)
        highest = higher
    tl.store(logprobs + row, target - highest - tl.log(total))
    tl.store(is_top1 + row, target == highest)
    if ENTROPY:
        tl.store(entropies + row, tl.log(total) - moment / total)


@jit
def _gradients(
    logits,
    token_ids,
    log_normalisers,
    entropies,
    d_logprobs,
    d_entropies,
    width,
    TEMPERATURE: constexpr,
    BLOCK: constexpr,
):
    TYPE: constexpr = log_normalisers.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = logits + row * width + column
    z = tl.load(place, mask=inside, other=0.0).to(TYPE) / TEMPERATURE
    log_p = z - tl.load(log_normalisers + row)
    grad = tl.zeros([BLOCK], TYPE)
    if d_entropies is not None:  # dH / dz = -p (log p + H)
        grad -= (log_p + tl.load(entropies + row)) * tl.load(d_entropies + row)
    if d_logprobs is not None:  # d log p_x / dz = 1_x - p
        grad -= tl.load(d_logprobs + row)
    grad = grad * tl.exp(log_p)
    if d_logprobs is not None:
        grad += tl.where(column == tl.load(token_ids + row), tl.load(d_logprobs + row), 0.0)
    tl.store(place, (grad / TEMPERATURE).to(logits.dtype.element_ty), mask=inside)


def row_statistics(
    logits: Logits, token_ids: Ids, temperature: float, entropy: bool
) -> tuple[PerRow, PerRow, Bool[Tensor, "S"]]:
    """Returns log p(x), entropy (zeros if not requested) and x = argmax p of every row, p = softmax(logits / temperature).

    Every logit is read once: the maximum m, the sum of exp(z - m) and the sum of exp(z - m) (z - m) are accumulated
    along the row and rescaled whenever the maximum grows (Milakov and Gimelshein, 2018; arXiv 1805.02867).
    """
    rows, width = logits.shape
    logprobs = logits.new_empty(rows, dtype=torch.promote_types(logits.dtype, torch.float32))
    entropies, is_top1 = torch.zeros_like(logprobs), logits.new_empty(rows, dtype=torch.bool)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(width))
        tensors = (logits.contiguous(), token_ids, logprobs, entropies, is_top1)
        _statistics[(rows,)](*tensors, width, temperature, entropy, block)
    return logprobs, entropies, is_top1


def logit_gradients_(
    logits: Logits, token_ids: Ids, logprobs: PerRow, entropies: PerRow, grads: Grads, temperature: float
) -> Logits:
    """Computes the same as `refine_lab.ops.head.logit_gradients_`."""
    rows, width = logits.shape
    logits = logits.contiguous()
    target = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).to(logprobs.dtype) / temperature
    if rows:
        block = min(BLOCK, triton.next_power_of_2(width))
        upstream = (None if x is None else x.contiguous() for x in grads)
        tensors = (logits, token_ids, target - logprobs, entropies, *upstream)
        _gradients[(rows, triton.cdiv(width, block))](*tensors, width, temperature, block)
    return logits
