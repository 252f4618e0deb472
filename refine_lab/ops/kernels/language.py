"""Imports Triton if it is installed; otherwise defines placeholders, so that the kernel modules can be imported but not run."""

from __future__ import annotations

from importlib.util import find_spec
from inspect import unwrap
from typing import TYPE_CHECKING, Any

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
    """Returns `triton.jit(function)` without the type checks that tests add, or the function itself if Triton is missing."""
    return function if triton is None else triton.jit(unwrap(function))
