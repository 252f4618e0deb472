"""Values of fake tensors: small integers are computed beside on the CPU, since they decide what a step does next.

Lengths, positions, masks of them and the tokens of the batch have values; activations have none. A number that is computed
from activations counts as 1.0, a test of all of them as passed and a test of any as failed, so that a step goes the way of
one whose loss is finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from benchmarks.fake_gpu.roofline import tensors_of

MOST_INTEGERS = 4_000_000
MOST_FLOATS = 64
"""Numbers of elements up to which values are computed."""
RANDOM = frozenset("rand randn randint randperm normal normal_ uniform_ random_ bernoulli multinomial empty".split())


def known(tensor: Tensor) -> Tensor | None:
    """Returns a tensor's values on the CPU, or None if it has none."""
    return getattr(tensor, "known_values", None) if isinstance(tensor, FakeTensor) else tensor


def give(tensor: Tensor, values: Tensor | None) -> Tensor:
    """Sets a fake tensor's values."""
    tensor.known_values = values  # type: ignore[attr-defined]
    return tensor


def follow(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """Gives an operation's results their values, if its arguments have some."""
    results = [x for x in tensors_of((out,)) if isinstance(x, FakeTensor)]
    if not results:
        return
    arguments = tensors_of(args, kwargs.values())
    if _small(results) and _named(func) not in RANDOM and all(known(x) is not None for x in arguments):
        values = tensors_of((computed(func, args, kwargs),))
        for result, value in zip(results, values, strict=True):
            give(result, value)
        return
    for result in results:
        if any(result is x for x in arguments):
            give(result, None)  # changed in place by something unknown
        if result.dim() == 0:
            give(result, _assumed(func, result.dtype))


def computed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Returns what an operation gives for the values of its arguments, on the CPU."""

    def value(x: Any) -> Any:
        return known(x) if isinstance(x, Tensor) else torch.device("cpu") if isinstance(x, torch.device) else x

    with _disable_current_modes():
        return func(*tree_map(value, args), **tree_map(value, kwargs))


def as_list(tensor: Tensor) -> Tensor:
    """Returns a tensor's values, and ones for values that are not known."""
    found = known(tensor)
    if found is not None:
        return found
    with _disable_current_modes():
        return torch.ones(tensor.shape, dtype=tensor.dtype)


def _small(results: list[FakeTensor]) -> bool:
    return all(x.numel() <= (MOST_FLOATS if x.dtype.is_floating_point else MOST_INTEGERS) for x in results)


def _assumed(func: Any, dtype: torch.dtype) -> Tensor | None:
    """Returns the value of a single number that is computed from unknown ones; None for an integer."""
    with _disable_current_modes():
        if dtype.is_floating_point:
            return torch.ones((), dtype=dtype)
        return torch.tensor(_named(func) != "any") if dtype == torch.bool else None


def _named(func: Any) -> str:
    return func.overloadpacket.__name__
