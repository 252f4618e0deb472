"""Factors on the writes of a forward pass: every token's write to each part of the memory, weakened or switched off.

A fast-weight layer writes every token with a strength (beta of the delta rule, the learning rates of LaCT), and a factor
multiplies it: 1 changes nothing, and 0 erases the write. In attention (LaCT's window, the full attention of hybrids) the
factor multiplies the token's values, so that 0 is value zeroing (Mohebbi et al., 2023; arXiv 2301.12971): the attention
weights stay as they are. Keys, queries and short convolutions are never changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from refine_lab.validation import require


@dataclass(frozen=True, order=True)
class MemoryPart:
    """A part of a model's memory: one kind of memory in one layer, with a factor for each token and head.

    `name` is `recurrent_state` (the delta rule), `fast_weights` or `window` (LaCT), or `keys_values` (full attention).
    """

    layer: int
    name: str
    heads: int

    @property
    def key(self) -> tuple[int, str]:
        return self.layer, self.name


Cell = tuple[int, str, int]
"""A head of a part of the memory: layer, name of the part, head."""


def heads_of(parts: Sequence[MemoryPart], cells: Collection[Cell] | None) -> dict[tuple[int, str], list[int]]:
    """Returns the chosen heads by (layer, name) of their part, each once and in ascending order; None chooses all.

    Raises ValueError for a head that no part has.
    """
    if cells is None:
        return {part.key: [*range(part.heads)] for part in parts}
    numbers, chosen = {part.key: part.heads for part in parts}, {}
    for layer, name, head in sorted({*cells}):
        fits = 0 <= head < numbers.get((layer, name), 0)
        require(fits, "a head", (layer, name, head), "one of the model's memory_parts")
        chosen.setdefault((layer, name), []).append(head)
    return chosen


Factors = Mapping[tuple[int, str], Float[Tensor, "B T H"]]
"""(layer, name) of a part -> the factor of every token's write in each head; other parts keep their writes."""

_FACTORS: ContextVar[Factors | None] = ContextVar("write_factors", default=None)
_ACTIVE: list[None] = []
"""One entry for each `scaled_writes` of any thread: torch.compile can read a list, but no context variable."""


@contextmanager
def scaled_writes(factors: Factors) -> Iterator[None]:
    """Multiplies the writes of forward passes in this context by `factors`; the model itself is not changed.

    A batch in this context must have the factors' rows and tokens. The states of its trace hold the scaled writes. Parts
    that are computed again in the backward pass (`models.activation_checkpointing`) must be so in the same context.
    """
    token = _FACTORS.set(factors)
    _ACTIVE.append(None)
    try:
        yield
    finally:
        _ACTIVE.pop()
        _FACTORS.reset(token)


def write_factors() -> Factors:
    """Returns the factors of the surrounding `scaled_writes`; empty without one."""
    return _FACTORS.get() or {} if _ACTIVE else {}


def scaled(layer: int, name: str, x: Float[Tensor, "B T H *rest"]) -> Float[Tensor, "B T H *rest"]:
    """Returns `x` multiplied by the factors of this part, or `x` itself if there are none."""
    factor = write_factors().get((layer, name))
    return x if factor is None else x * factor.to(x.dtype).view(*factor.shape, *[1] * (x.ndim - 3))
