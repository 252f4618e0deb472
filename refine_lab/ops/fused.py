"""flash-linear-attention's fused kernels for norms and SwiGLU, for steps in 16 bits on CUDA; plain torch elsewhere.

A block adds its residual in float32, and its layers multiply in 16 bits. The kernels round once, where a layer begins:
no norm makes several float32 tensors of the size of the hidden states, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from refine_lab.ops.fla_delta_rule import serves
from refine_lab.ops.precision import gated_product, rms_norm

HALF = (torch.bfloat16, torch.float16)
LONGEST = 65_536
"""Most bytes of a vector that fla's norms accept."""


def fuses(x: Float[Tensor, "B T *heads D"]) -> bool:
    """Returns whether the kernels compute a layer: on CUDA under autocast to 16 bits, except for a single token.

    The step of a single token is compiled as a whole (`models.decode_step`).
    """
    if x.shape[1] == 1 or x.shape[-1] * x.element_size() > LONGEST or not serves(x.device, gated=False):
        return False
    return torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) in HALF


def pre_norm(norm: nn.RMSNorm, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Returns the norm of `x`; fused kernels return it in autocast's dtype, in which the next layer multiplies."""
    return fused_rms_norm(norm, x)[0] if fuses(x) else norm(x)


def add_and_norm(
    norm: nn.RMSNorm, x: Float[Tensor, "B T D"], residual: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """Returns the norm of `residual + x`, as `pre_norm`, and the sum."""
    if fuses(residual):
        return fused_rms_norm(norm, x, residual)
    residual = residual + x
    return norm(residual), residual


def head_norm(norm: nn.RMSNorm, x: Float[Tensor, "B T *heads D"]) -> Float[Tensor, "B T *heads D"]:
    """Returns the norm of a layer's output; `ops.precision.rms_norm` unless the kernels take its 16 bits."""
    fused = x.dtype in HALF and fuses(x)
    return fused_rms_norm(norm, x)[0] if fused else rms_norm(norm, x)


def fused_rms_norm(norm: nn.RMSNorm, x: Tensor, residual: Tensor | None = None) -> tuple[Any, Any]:
    """Returns the norm of `x` or of `residual + x` in autocast's dtype, and the sum in the dtype of the residual, if any."""
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return _FusedNorm.apply(x, norm.weight, residual, eps, torch.get_autocast_dtype(x.device.type))


class _FusedNorm(torch.autograd.Function):
    """fla's norm, whose output may have fewer bits than the sum; without a residual, no sum is returned.

    The gradient of the sum stays in the dtype of the residual: fla's own function rounds it to that of `x`.
    """

    @staticmethod
    def forward(ctx, x, weight, residual, eps, dtype):
        kernel, _ = _norm_kernels()
        rows, before = _rows(x), None if residual is None else _rows(residual)
        y, _, scale, total = kernel(rows, weight, None, eps=eps, residual=before, out_dtype=dtype, is_rms_norm=True)
        ctx.save_for_backward(total, weight, scale)
        ctx.dtype, ctx.added = x.dtype, residual is not None
        return y.view(x.shape), total.view(x.shape) if ctx.added else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total):
        _, kernel = _norm_kernels()
        total, weight, scale = ctx.saved_tensors
        later = None if grad_total is None else _rows(grad_total)
        dx, dw, _, _ = kernel(_rows(grad), total, weight, None, None, scale, dres=later, is_rms_norm=True)
        dx = dx.view(grad.shape)
        return dx.to(ctx.dtype), dw, dx if ctx.added else None, None, None


@cache
def _norm_kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns fla's kernels of the forward and the backward pass, which run on the device of their first tensor."""
    from fla.modules.norm.layernorm import layer_norm_bwd, layer_norm_fwd  # binds Triton: imported on CUDA only
    from fla.utils import input_guard

    guard: Any = input_guard  # whose signature expects a kernel that returns one tensor
    return guard(layer_norm_fwd), guard(layer_norm_bwd)


def _rows(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "R D"]:
    return x.contiguous().view(-1, x.shape[-1])


def swiglu(
    gate: Float[Tensor, "B T D"], up: Float[Tensor, "B T D"], down: Callable[[Tensor], Tensor]
) -> Float[Tensor, "B T E"]:
    """Returns `down` of silu(gate) * up; the kernel for bfloat16 keeps nothing but its arguments for the backward pass."""
    if gate.dtype != torch.bfloat16 or not fuses(gate):
        return gated_product(gate, up, down)
    return down(swiglu_kernel(gate, up))


def swiglu_kernel(gate: Float[Tensor, "B T D"], up: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Returns silu(gate) * up by fla's kernel."""
    from fla.modules.activations import swiglu as kernel  # binds Triton: imported where it is used, on CUDA only

    return kernel(gate, up)
