"""Lets fla's Triton kernels run on CPU tensors under Triton's interpreter, in a process that has TRITON_INTERPRET=1.

The interpreter of Triton 3.7 differs from its compiler in three ways that fla's kernels meet. `install` mends them:

- The autotuner asks the device for timings: here the first variant that is left after pruning is taken.
- A loop variable is a Python int, and kernels call methods of a tensor on it: here it is converted.
- A bfloat16 is stored as its 16 bits, and arithmetic adds and multiplies these bits as integers: here operands are
  converted to float32, and results rounded to the nearest bfloat16.

What this cannot see are errors of the compiler, which only a GPU shows.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np

from refine_lab.models.imports import import_quietly


@cache
def install() -> None:
    """Changes the interpreter of this process, and imports fla, which then finds no GPU and keeps to the CPU."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before Triton is imported"
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *arguments, config, **meta: [0.0, 0.0, 0.0]
    interpreter.FunctionRewriter.ast_transformer = _loop_variables_as_tensors(interpreter.ASTTransformer)()
    _compute_bfloat16_in_float32(interpreter)
    import_quietly("fla.ops", "flash-linear-attention")


def _loop_variables_as_tensors(base: Any) -> type:
    class Transformer(base):
        def visit_For(self, node: ast.For) -> ast.For:
            self.generic_visit(node)
            over = node.iter.func if isinstance(node.iter, ast.Call) else None
            if isinstance(over, ast.Name) and over.id == "range" and isinstance(node.target, ast.Name):
                same = ast.parse(f"{node.target.id} = {node.target.id}").body[0]
                node.body.insert(0, self.visit_Assign(same))  # the base class converts what is assigned
            return node

    return Transformer


# -- bfloat16 --------------------------------------------------------------------------------------------------------------


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Returns the numbers that 16-bit patterns stand for."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def to_bits(numbers: np.ndarray) -> np.ndarray:
    """Returns the patterns of the nearest bfloat16 numbers, ties to even."""
    wide = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).reshape(np.shape(numbers))
    rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt", "create_fabs")
CASTS = ("create_fp_trunc", "create_fp_ext", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui")


def _compute_bfloat16_in_float32(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bfloat16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widened(x: Any) -> Any:
        return handle(to_float32(x.data), tl.float32) if is_bfloat16(x) else x

    def rounding(method: Callable[..., Any]) -> Callable[..., Any]:
        """Computes a method in float32 where an operand is bfloat16; only comparisons keep their results."""

        @wraps(method)
        def call(self: Any, *operands: Any) -> Any:
            if not any(map(is_bfloat16, operands)):
                return method(self, *operands)
            found = method(self, *map(widened, operands))
            if found.data.dtype == bool:
                return handle(found.data, tl.int1)
            return handle(to_bits(found.data), tl.bfloat16)

        return call

    for name in ARITHMETIC:
        setattr(builder, name, rounding(getattr(builder, name)))
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)  # products are summed in the accumulator's dtype

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return cast(self, widened(source), target)
        return source if is_bfloat16(source) else handle(to_bits(source.data.astype(np.float32)), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    for name in CASTS:
        setattr(builder, name, cast_impl)
    builder.create_fp_to_fp = lambda self, source, target, rounding_mode=None: cast_impl(self, source, target)
    _reduce_in_float32(interpreter, tl.bfloat16, tl.float32)


def _reduce_in_float32(interpreter: Any, narrow: Any, wide: Any) -> None:
    """Makes sums, maxima and running sums of bfloat16 blocks those of numbers."""
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        apply = operation.apply_impl

        def apply_impl(self: Any, inputs: Any, apply: Any = apply) -> Any:
            if not any(x.dtype.scalar == narrow for x in inputs):
                return apply(self, inputs)
            widened = tuple(self.to_tensor(to_float32(x.handle.data), wide) for x in inputs)
            found = apply(self, widened)
            several = isinstance(found, (tuple, list))
            rounded = [
                self.to_tensor(to_bits(x.handle.data), narrow) if x.dtype.scalar == wide else x
                for x in (found if several else [found])
            ]
            return type(found)(rounded) if several else rounded[0]

        operation.apply_impl = apply_impl
