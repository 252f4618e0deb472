"""Custom selections: a function in a run's `selection.py` or in a notebook cell that scores positions."""

from __future__ import annotations

import functools
import math

from jaxtyping import Float
from torch import Tensor

from refine_lab.method.custom import contained, load_function
from refine_lab.types import SelectionFunction, SelectionInputs

LARGEST = 1e15
"""Largest absolute value of a score."""


def selection_function(source: str | None) -> SelectionFunction:
    """Returns the selection that `source` defines, wrapped by `checked_selection`. Raises ValueError without a source."""
    if source is None:
        raise ValueError("selection 'custom' needs the source of a function, got none")
    return checked_selection(load_function("selection", source))


def checked_selection(selection: SelectionFunction) -> SelectionFunction:
    """Wraps `selection` to run without gradients on copies of its inputs, and verifies its scores.

    The wrapped function raises a ValueError that names the selection unless it returns a float tensor [B, T] whose
    values are finite within each row, and a RuntimeError that names it for any error inside it.
    """
    name = getattr(selection, "__name__", repr(selection))

    @functools.wraps(selection)
    def run(inputs: SelectionInputs) -> Float[Tensor, "B T"]:
        copies, shape = inputs.detached(), inputs.tokens.shape
        scores = contained("selection", name, lambda: selection(copies))
        allowed = (
            f"selection {name!r} must return one floating-point number per position, a tensor of shape {list(shape)}"
        )
        if not isinstance(scores, Tensor):
            raise ValueError(f"{allowed}, got {type(scores).__name__}")
        if scores.shape != shape or not scores.is_floating_point():
            raise ValueError(f"{allowed}, got {scores.dtype} of shape {list(scores.shape)}")
        scores = scores.detach()
        for row, length in enumerate(inputs.lengths.tolist()):
            if (bad := (~(scores[row, :length].abs() <= LARGEST)).nonzero()).numel():
                value = float(scores[row, bad[0]])
                limits = "finite" if not math.isfinite(value) else f"between -{LARGEST:g} and {LARGEST:g}"
                raise ValueError(f"selection {name!r} must be {limits}, got {value} at position {int(bad[0])}")
        return scores

    return run
