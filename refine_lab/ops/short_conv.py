"""Depthwise causal convolution over a few tokens, whose window is passed and returned as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.ops.precision import wide


@dataclass
class ConvInputs:
    """The inputs of a convolution over W tokens, and the w = W - 1 before them (`before`; None: zeros)."""

    before: Float[Tensor, "B w D"] | None
    inputs: Float[Tensor, "B T D"]
    width: int
    _joined: Float[Tensor, "B S D"] | None = None

    @property
    def joined(self) -> Float[Tensor, "B S D"]:
        """Returns both, one after the other; S = w + T. The first call stores them."""
        if self._joined is None:  # torch.compile cannot trace functools.cached_property
            self._joined = after_window(self.before, self.inputs, self.width)
        return self._joined

    def at(self, positions: Int[Tensor, "B P"]) -> Float[Tensor, "B*P w D"]:
        """Returns the w inputs up to and including each position, oldest first, as `window_at`; joins nothing for it."""
        if self._joined is not None:
            return window_at(self._joined, positions, self.width)
        rows, total, channels = self.inputs.shape
        place = positions.unsqueeze(-1) + torch.arange(1 - self.width, 1, device=positions.device)  # below 0: before
        row = torch.arange(rows, device=positions.device).view(-1, 1, 1)
        index = (row * total + place.clamp(min=0)).flatten()
        found = self.inputs.reshape(-1, channels).index_select(0, index)
        early = (place < 0).flatten().unsqueeze(-1)
        if self.before is None:
            found = found.masked_fill(early, 0)
        else:
            index = (row * self.width + (place + self.width).clamp(max=self.width - 1)).flatten()
            before = self.before.to(found).reshape(-1, channels)
            found = torch.where(early, before.index_select(0, index), found)
        return found.view(positions.numel(), self.width, channels)


def fused_conv_silu(inputs: ConvInputs, weight: Float[Tensor, "D 1 W"]) -> Float[Tensor, "B T D"]:
    """Returns silu of `causal_conv` by fla's kernel, in the dtype of the inputs; sums are in float32."""
    from fla.modules.causal_conv1d import causal_conv1d  # binds Triton: imported where it is used, on CUDA only

    before = None
    if inputs.before is not None:  # the kernel's window has the width of the weight, and its first entry is not read
        before = F.pad(inputs.before.to(inputs.inputs).transpose(1, 2), (1, 0))
    kernel: Any = causal_conv1d  # without its signature
    return kernel(inputs.inputs, weight.squeeze(1), initial_state=before, activation="silu")[0]


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
