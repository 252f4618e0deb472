"""A cache of documents that were read, bounded by the memory of their traces."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from refine_lab.explore.reading import DocumentReading
from refine_lab.models import Trace

DOCUMENTS = 4
"""Number of cached forward passes, each with its trace; the least recently used is dropped first."""
BYTES = 16 * 2**30
"""Size of all cached traces from which the least recently used are dropped; the latest stays, whatever its size.

The trace of 16,384 tokens of DeltaNet-1.3B has about this size.
"""


@dataclass(frozen=True, eq=False)
class CachedDocument:
    """A document that was read, with its trace and write strengths."""

    reading: DocumentReading
    trace: Trace
    writes: dict[int, Float[Tensor, "T H"]]  # see `states.written`


class DocumentCache(OrderedDict[tuple[str, str], CachedDocument]):
    """Documents by model and digest, the least recently used first."""

    def add(self, key: tuple[str, str], document: CachedDocument) -> None:
        """Adds a document, and drops earlier ones until there are at most `DOCUMENTS` with at most `BYTES`."""
        self[key] = document
        while len(self) > DOCUMENTS or (len(self) > 1 and self.nbytes > BYTES):
            self.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Returns the size of all tensors; what several documents share counts once."""
        return nbytes(document.trace for document in self.values())


def nbytes(x: Any) -> int:
    """Returns the memory of all tensors that an object, or a function that it holds, refers to; models count nothing."""
    storages = (tensor.untyped_storage() for tensor in _tensors(x, set()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(x: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(x) in seen or isinstance(x, nn.Module):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
        return
    for part in _parts(x):
        yield from _tensors(part, seen)


def _parts(x: Any) -> Iterator[Any]:
    """Yields what an object is made of: entries, fields, and what a function is bound to."""
    if isinstance(x, Mapping):
        yield from x.values()
    elif isinstance(x, (list, tuple, Iterator)):
        yield from x
    elif isinstance(x, partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, MethodType):
        yield x.__self__
    elif isinstance(x, FunctionType):
        yield from (cell.cell_contents for cell in x.__closure__ or ())
    elif is_dataclass(x) or type(x).__module__.startswith("refine_lab."):
        yield from getattr(x, "__dict__", {}).values()
