"""What is computed in which dtype: the arithmetic of a run, and sums of half-precision numbers in float32.

float16 ends at 65,504, and bfloat16 has eight bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def wide(x: Tensor) -> torch.dtype:
    """The dtype that sums are taken in: float32, or the tensor's own where it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Arithmetic in the dtype of that name on a device, parameters as they are; "float32" turns an autocast off."""
    precision = getattr(torch, dtype)
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def without_float16(device: torch.device) -> AbstractContextManager:
    """Leave an autocast to float16 aside, for sums that would pass its range; an autocast to bfloat16 stays."""
    narrow = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return torch.autocast(device.type, enabled=False) if narrow else nullcontext()


def rms_norm(norm: nn.RMSNorm, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """x / sqrt(mean x^2 + eps) * weight of x as it came, however wide; the result has the dtype of the weight."""
    dtype = torch.promote_types(wide(x), norm.weight.dtype)
    y = F.rms_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.eps)
    return y.to(norm.weight.dtype)


def gated_product(
    gate: Float[Tensor, "*rows D"],
    up: Float[Tensor, "*rows D"],
    down: Callable[[Tensor], Tensor],
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """`down` of activation(gate) * up: the end of a gated feed-forward part.

    A product of two float16 numbers can pass 65,504. In float16 it is therefore taken in float32 and divided, token by token,
    by the power of two that brings it below 2^15; `down`, which must be linear and without a bias, gives the power back.
    """
    if gate.dtype != torch.float16:
        return down(activation(gate) * up)
    product = activation(gate.float()) * up.float()
    _, exponent = torch.frexp(product.detach().abs().amax(-1, keepdim=True))
    power = torch.exp2((exponent - 15).clamp(min=0).float())
    return (down((product / power).half()).float() * power).half()
