"""What is in memory: every allocation of the fake device and when it is freed, so that the peak can be taken apart."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.fake_gpu.sources import Place

BLOCK = 512
"""Bytes to which CUDA's caching allocator rounds up; its fragmentation is not counted."""
GIB = 2**30
PARTS = ("weights", "gradients", "moments", "activations")
GATHERED = "gathered"
"""The part of weights that are gathered from other workers, and of the buffers of their exchange."""


@dataclass
class Allocation:
    """A tensor's memory: its size, where it was made, and the part of the total that it belongs to."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: Place
    part: str = "activations"


class Ledger:
    """Follows the storages on the device. A storage counts from the first operation that returns it until it is freed."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.changes: list[tuple[int, int]] = []  # (index of an allocation, its bytes or minus its bytes), in order
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # address of a storage -> index and reference
        self._empty: set[int] = set()  # indices of storages whose memory was given back
        self._begin = 0

    def add(self, tensor: Tensor, place: Place) -> None:
        """Notes a tensor that an operation returned; one whose storage is known, such as a view, changes nothing."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        nbytes, index = -(-storage.nbytes() // BLOCK) * BLOCK, len(self.allocations)

        def freed(_: object) -> None:
            if self._alive.pop(address, None) is not None and index not in self._empty:
                self.changes.append((index, -nbytes))

        self._alive[address] = index, weakref.ref(storage, freed)
        self.allocations.append(Allocation(nbytes, tuple(tensor.shape), tensor.dtype, place))
        self.changes.append((index, nbytes))

    def resized(self, tensor: Tensor) -> None:
        """Notes that a storage has given its memory back, or has taken it again."""
        storage = tensor.untyped_storage()
        index, _ = self._alive[storage._cdata]
        empty, nbytes = storage.nbytes() == 0, self.allocations[index].nbytes
        if empty and index not in self._empty:
            self._empty.add(index)
            self.changes.append((index, -nbytes))
        elif not empty and index in self._empty:
            self._empty.remove(index)
            self.changes.append((index, nbytes))

    def mark(self, tensors: Iterable[Tensor], part: str) -> None:
        """Assigns the memory of tensors to a part of the total."""
        for tensor in tensors:
            tensor = getattr(tensor, "_local_tensor", tensor)  # this worker's share
            found = self._alive.get(tensor.untyped_storage()._cdata)
            if found is not None:
                self.allocations[found[0]].part = part

    def begin(self) -> None:
        """Begins the time whose peak is measured."""
        self._begin = len(self.changes)

    def made(self) -> list[Allocation]:
        """Returns the allocations since `begin`."""
        return [self.allocations[index] for index, nbytes in self.changes[self._begin :] if nbytes > 0]

    def at_peak(self) -> list[Allocation]:
        """Returns what was in memory when the total since `begin` was largest."""
        total, largest, end = sum(nbytes for _, nbytes in self.changes[: self._begin]), -1, 0
        for place, (_, nbytes) in enumerate([(0, 0), *self.changes[self._begin :]]):
            total += nbytes
            if total > largest:
                largest, end = total, self._begin + place
        alive: dict[int, None] = {}
        for index, nbytes in self.changes[:end]:
            if nbytes > 0:
                alive[index] = None
            else:
                alive.pop(index, None)
        return [self.allocations[index] for index in alive]


def by_part(allocations: Iterable[Allocation]) -> dict[str, float]:
    """Returns GiB by part, and their `total`."""
    sums: dict[str, int] = defaultdict(int)
    for each in allocations:
        sums[each.part] += each.nbytes
    parts = {part: sums[part] / GIB for part in (*PARTS, *([GATHERED] if GATHERED in sums else []))}
    return {**parts, "total": sum(parts.values())}
