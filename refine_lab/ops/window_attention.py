"""Causal attention to the last W tokens in O(T W) time, whose window is passed and returned as a value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from refine_lab.host import full, host, indices

Packed = Float[Tensor, "tokens H d"]
"""The tokens of all rows, one row after another, without padding."""

Kernel = Callable[[Packed, Packed, Packed, Int[Tensor, "_"], Int[Tensor, "_"], int, int], Packed]
"""(q, k, v, the first query and key of each row and their numbers in all, the longest rows of queries and of keys) -> outputs.

The last query of a row sees the last `window` keys of that row, and so on backwards.
"""

WIDEST = 256
"""Largest head width of torch's flash attention; widths must be multiples of 8."""


def window_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S H d"],
    v: Float[Tensor, "B S H d"],
    before: Int[Tensor, "B"],
    window: int,
    packing: Callable[[], Packing] | None = None,
) -> Float[Tensor, "B T H d"]:
    """Returns softmax(q_i k_j / sqrt(d)) v_j over the `window` tokens j up to and including i; S = w + T with w = `window` - 1.

    `k` and `v` begin with the w tokens before the first query, oldest first, of which the last `before` are real (all
    of them if `before` exceeds w). In half precision on CUDA, the computation uses torch's flash attention for rows of
    unequal length, else scaled_dot_product_attention on blocks of `window` queries, each with the keys of its own block
    and the previous one. `packing` returns `Packing.of` the batch; layers share one.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and _fits(q) and flash_window() is not None:
        rows = Packing.of(before, q.shape[1], window) if packing is None else packing()
        return packed_attention(q, k, v, rows, partial(_flash, window))
    length = q.shape[1]
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
    rest = _masked(q, k, v, F.pad(_band(window, 2 * window - 1, window, full((1,), window, before.device)), (1, 0)))
    rest = rest.unflatten(0, (len(before), -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], 2)[:, :, :length].transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Packing:
    """Which keys of a batch are real, and where each row's queries and real keys begin when they are packed."""

    starts_q: Int[Tensor, "_"]
    starts_k: Int[Tensor, "_"]
    most_k: int
    skipped: int | None
    "The number of keys that are not real in every row; None if rows differ."
    kept: Int[Tensor, "tokens"] | None
    "The indices of the real keys over all rows, if rows differ."

    @staticmethod
    def of(before: Int[Tensor, "B"], length: int, window: int) -> Packing:
        """Returns the packing of rows with `length` queries and `window` - 1 + `length` keys; see `window_attention`."""
        real, device = host(before).clamp(max=window - 1), before.device
        sizes = real + length
        starts = (F.pad(x.cumsum(0), (1, 0)).int() for x in (torch.full_like(sizes, length), sizes))
        starts_q, starts_k = (indices(x, device) for x in starts)
        if real.min() == real.max():
            return Packing(starts_q, starts_k, int(sizes.max()), window - 1 - int(real[0]), None)
        place = torch.arange(window - 1 + length)
        kept = (place >= window - 1 - real.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
        return Packing(starts_q, starts_k, int(sizes.max()), None, indices(kept, device))

    def keys(self, x: Float[Tensor, "B S H d"]) -> Packed:
        """Returns the real keys, or values, of all rows."""
        if self.kept is None:
            return x[:, self.skipped :].flatten(0, 1)
        return x.flatten(0, 1).index_select(0, self.kept)


def packed_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S H d"],
    v: Float[Tensor, "B S H d"],
    rows: Packing,
    kernel: Kernel,
) -> Float[Tensor, "B T H d"]:
    """Computes `window_attention` with a kernel for rows of unequal length, which sees the real keys alone."""
    found = kernel(q.flatten(0, 1), rows.keys(k), rows.keys(v), rows.starts_q, rows.starts_k, q.shape[1], rows.most_k)
    return found.unflatten(0, q.shape[:2])


def _fits(q: Tensor) -> bool:
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST


@cache
def flash_window() -> Callable[..., Any] | None:
    """Returns torch's flash attention for rows of unequal length if this version of torch has it with a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def _flash(
    window: int, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int
) -> Tensor:
    attend = flash_window()
    assert attend is not None
    return attend(q, k, v, starts_q, starts_k, most_q, most_k, window_size=(window - 1, 0))


def _band(queries: int, keys: int, window: int, before: Int[Tensor, "rows"]) -> Bool[Tensor, "rows 1 queries keys"]:
    """Returns which keys each query attends to: key j is j - w tokens after the first query, w = `window` - 1."""
    i = torch.arange(queries, device=before.device).unsqueeze(-1)
    j = torch.arange(keys, device=before.device)
    real = j >= (window - 1 - before).unsqueeze(-1)
    return ((j >= i) & (j <= i + window - 1) & real.unsqueeze(1)).unsqueeze(1)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if q.is_cuda and _fits(q) else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
