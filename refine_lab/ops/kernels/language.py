"""Imports Triton where it is installed; elsewhere, defines placeholders with which the kernel modules import but cannot run."""

from __future__ import annotations

from importlib.util import find_spec
from inspect import unwrap
from typing import TYPE_CHECKING, Any

import torch

triton: Any = None
tl: Any = None
if find_spec("triton") is not None:
    import triton
    import triton.language as tl

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = Any if tl is None else tl.constexpr


def jit(function: Any) -> Any:
    """Returns `triton.jit(function)`, or the function itself if Triton is not installed."""
    return (
        function if triton is None else triton.jit(unwrap(function))
    )  # without the type checks that tests wrap around


def accumulator(dtype: torch.dtype) -> Any:
    """Returns the dtype that a kernel computes in: float64 for float64, else float32. Raises ImportError without Triton."""
    if triton is None:
        raise ImportError("the kernels of refine_lab.ops.kernels need triton, which is not installed here")
    return tl.float64 if dtype == torch.float64 else tl.float32
