"""Which dtype is used where: autocast for a run, and float32 for sums of half-precision numbers.

The largest float16 is 65,504, and bfloat16 has eight bits of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

UNIT_EPS = 1e-6


def wide(x: Tensor) -> torch.dtype:
    """Returns the dtype for sums: float32, or the tensor's own if it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Returns an autocast to the dtype of that name on a device, with parameters unchanged; "float32" turns autocast off."""
    precision = getattr(torch, dtype)
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def autocasts_to(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether autocast to that dtype is on."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == dtype


def use_tf32(device: torch.device) -> None:
    """Has this process multiply float32 matrices on CUDA in TF32, with float32 sums; changes nothing on the CPU.

    Comparisons in float32, such as the parity gate, run in `without_tf32`.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiplies float32 matrices in float32 in this context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def without_float16(device: torch.device) -> AbstractContextManager:
    """Disables autocast to float16, for sums that would exceed its range; autocast to bfloat16 remains."""
    return torch.autocast(device.type, enabled=False) if autocasts_to(device, torch.float16) else nullcontext()


def rms_norm(norm: nn.RMSNorm, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Returns x / sqrt(mean x^2 + eps) * weight, computed in the wider dtype of x and weight, in the weight's dtype."""
    dtype = torch.promote_types(wide(x), norm.weight.dtype)
    y = F.rms_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.eps)
    return y.to(norm.weight.dtype)


def unit_length(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Returns x / sqrt(sum x^2 + `UNIT_EPS`), the norm of q and k in fla's kernels, in at least float32."""
    x = x.to(wide(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def gated_product(
    gate: Float[Tensor, "*rows D"],
    up: Float[Tensor, "*rows D"],
    down: Callable[[Tensor], Tensor],
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """Returns `down` of activation(gate) * up: the output of a gated feed-forward layer.

    A product of two float16 numbers can exceed 65,504. In float16 it is therefore computed in float32 and divided, per
    token, by the power of two that brings it below 2^15; the output of `down`, which must be linear and without a bias,
    is multiplied by that power.
    """
    if gate.dtype != torch.float16:
        return down(activation(gate) * up)
    product = activation(gate.float()) * up.float()
    _, exponent = torch.frexp(product.detach().abs().amax(-1, keepdim=True))
    power = torch.exp2((exponent - 15).clamp(min=0).float())
    return (down((product / power).half()).float() * power).half()
