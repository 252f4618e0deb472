"""Depthwise causal convolution over a few tokens, whose window is passed and returned as a value."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.ops.precision import wide


def causal_conv(x: Float[Tensor, "B S D"], weight: Float[Tensor, "D 1 W"]) -> Float[Tensor, "B T D"]:
    """y_t = sum_j weight_j x_{t-W+1+j}, channel by channel; S = w + T: `x` begins with the w = W - 1 inputs before token 0.

    Half-precision numbers are summed in float32.
    """
    # W shifted products: on the CPU quicker than conv1d with one channel a group
    width = weight.shape[-1]
    length = x.shape[1] - width + 1
    dtype = torch.promote_types(x.dtype, weight.dtype)
    weight = weight.to(wide(weight))
    y = x[:, :length] * weight[:, 0, 0]
    for j in range(1, width):
        y = torch.addcmul(y, x[:, j : j + length], weight[:, 0, j])
    return y.to(dtype)


def after_window(
    window: Float[Tensor, "B w D"] | None, x: Float[Tensor, "B T D"], width: int
) -> Float[Tensor, "B S D"]:
    """Returns `x` after the w = `width` inputs before it, which are zeros at the start of a sequence; S = w + T."""
    before = x.new_zeros(len(x), width, x.shape[-1]) if window is None else window.to(x)
    return torch.cat([before, x], 1)


def window_at(x: Float[Tensor, "B S D"], positions: Int[Tensor, "B P"], width: int) -> Float[Tensor, "B*P w D"]:
    """Returns the w = `width` inputs up to and including each position, oldest first.

    S = w + T: `x` begins with w inputs before token 0.
    """
    rows, total, channels = x.shape
    offsets = torch.arange(1, width + 1, device=x.device)
    start = torch.arange(rows, device=x.device).view(-1, 1, 1) * total
    index = start + positions.unsqueeze(-1) + offsets
    return x.reshape(rows * total, channels).index_select(0, index.flatten()).view(positions.numel(), width, channels)
