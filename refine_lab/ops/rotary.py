"""Rotary position embeddings (Su et al., 2021; arXiv 2104.09864) rotate pairs of channels, one from each half of a head."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_angles(positions: Int[Tensor, "B T"], width: int, base: float) -> Float[Tensor, "B T half"]:
    """Returns the angle p * base^(-2i / width) of each position p and pair i, in float32 as in flash-linear-attention."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    return positions.unsqueeze(-1).float() * (1.0 / base**exponents)


def rotate(x: Float[Tensor, "B T H d"], angles: Float[Tensor, "B T half"]) -> Float[Tensor, "B T H d"]:
    """Rotates `x` by its tokens' angles, channel i against channel i + d / 2."""
    cos, sin = (f(angles).to(x.dtype).unsqueeze(2) for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
