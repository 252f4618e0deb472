"""Attention on the fake device: the memory-efficient kernel that CUDA chooses for a mask, and the flash kernel without one.

torch's CPU build has none of CUDA's fused kernels to choose from, and would take the product of all queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16
"""The kernel asks for rows of the mask whose number of elements is a multiple of this: CUDA pads them."""


@contextmanager
def fused_attention() -> Iterator[None]:
    """Replaces `scaled_dot_product_attention` for tensors on CUDA."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **named: Any) -> Tensor:
        if query.device.type != "cuda":
            return original(query, key, value, attn_mask, *args, **named)
        return _fused(query, key, value, attn_mask, *args, **named)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(times, -3) for x in (key, value))
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Returns the mask as the kernel reads it: 0 and minus infinity in the dtype of the queries, in aligned rows."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    width = mask.shape[-1]
    if width % ALIGNED:
        mask = F.pad(mask, (0, -width % ALIGNED))[..., :width]
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
