"""Causal attention to the last W tokens in O(T W) time, whose window is passed and returned as a value."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.host import host


def window_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S H d"],
    v: Float[Tensor, "B S H d"],
    before: Int[Tensor, "B"],
    window: int,
) -> Float[Tensor, "B T H d"]:
    """Returns softmax(q_i k_j / sqrt(d)) v_j over the `window` tokens j up to and including i; S = w + T with w = `window` - 1.

    `k` and `v` begin with the w tokens before the first query, oldest first, of which the last `before` are real (all
    of them if `before` exceeds w). The computation uses torch's scaled_dot_product_attention on blocks of `window`
    queries, each with the keys of its own block and the previous one, or flash-attn where it is installed and the
    preceding keys are all real or all absent.
    """
    length = q.shape[1]
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and find_spec("flash_attn") is not None:
        if (host(before) >= window - 1).all():
            return _flash(q, k, v, window)
        if not host(before).any():
            return _flash(q, k[:, window - 1 :], v[:, window - 1 :], window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if length <= window:
        return _masked(q, k, v, _band(length, k.shape[2], window, before)).transpose(1, 2)
    # keys in blocks: one token more in front, so that the queries' blocks are keys' blocks too
    behind = -length % window
    k, v = (F.pad(x, (0, 0, 1, behind)).unflatten(2, (-1, window)) for x in (k, v))
    q = F.pad(q, (0, 0, 0, behind)).unflatten(2, (-1, window))
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], 3) for x in (k, v))
    first = _masked(q[:, :, 0], k[:, :, 0, 1:], v[:, :, 0, 1:], _band(window, 2 * window - 1, window, before))
    q, k, v = (x[:, :, 1:].transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    full = before.new_full((1,), window)
    rest = _masked(q, k, v, F.pad(_band(window, 2 * window - 1, window, full), (1, 0)))
    rest = rest.unflatten(0, (len(before), -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], 2)[:, :, :length].transpose(1, 2)


def _band(queries: int, keys: int, window: int, before: Int[Tensor, "rows"]) -> Bool[Tensor, "rows 1 queries keys"]:
    """Returns which keys each query attends to: key j is j - w tokens after the first query, w = `window` - 1."""
    i = torch.arange(queries, device=before.device).unsqueeze(-1)
    j = torch.arange(keys, device=before.device)
    real = j >= (window - 1 - before).unsqueeze(-1)
    return ((j >= i) & (j <= i + window - 1) & real.unsqueeze(1)).unsqueeze(1)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    from flash_attn import flash_attn_func  # optional, and only there on CUDA  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
