"""One of several workers: the weights are divided among them with FSDP2, and what they exchange is counted.

torch's process group `fake` has any number of workers in one process, and exchanges nothing. Every exchange is noted
between the device's work before and after it, so that the part of it that runs beside this work can be estimated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg as fake
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.fake_gpu.ledger import GATHERED, GIB, Ledger
from refine_lab.models import FastWeightLM, sharding
from refine_lab.workers import Workers

LINKS = {"NVLink": 450e9, "InfiniBand": 50e9}
"""Bytes a second that an H100 or H200 receives, and as many that it sends: within a node, and at 400 Gb/s between nodes."""
KINDS = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "sum",
    "allgather_": "sum",
    "split_with_sizes_copy": "use",
}
"""Operation -> what it does: `use` copies gathered weights to their place, for which the device's work waits."""


class Exchange(NamedTuple):
    """One exchange: its phase of the step, the bytes that this worker receives, and the seconds of work before it."""

    kind: str
    phase: str
    nbytes: int
    work: float


class Exchanges(list[Exchange]):
    """The exchanges of a step among some workers, in the order in which they are asked for."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers, self._seconds = workers, 0.0

    def clear(self) -> None:
        super().clear()
        self._seconds = 0.0

    def note(self, name: str, tensors: list[Tensor], phase: str, seconds: float) -> None:
        """Notes an operation, if it is an exchange, after `seconds` of the device's work since the step began."""
        kind = KINDS.get(name)
        if kind is None:
            return
        whole = 0 if kind == "use" else max(x.numel() * x.element_size() for x in tensors)
        received = whole * (self.workers - 1) // self.workers * (2 if name == "allreduce_" else 1)  # in a ring
        self.append(Exchange(kind, phase, received, seconds - self._seconds))
        self._seconds = seconds

    def figures(self, seconds: float) -> dict[str, Any]:
        """Returns GiB received by kind and by phase, and the estimated overlap with `seconds` of the device's work."""
        kinds: Counter[str] = Counter()
        phases: Counter[str] = Counter()
        for each in self:
            if each.kind != "use":
                kinds[each.kind] += each.nbytes
                phases[each.phase] += each.nbytes
        total = sum(kinds.values())
        exposed = {name: self.finished(seconds, link) - seconds for name, link in LINKS.items()}
        return {
            "exchanges": sum(each.kind != "use" for each in self),
            "received_gib": {name: size / GIB for name, size in kinds.items()},
            "received_gib_by_phase": {name: size / GIB for name, size in phases.items()},
            "links": {
                name: {
                    "exchange_seconds": total / link,
                    "exposed_seconds": exposed[name],
                    "overlap": 1 - exposed[name] / (total / link),
                }
                for name, link in LINKS.items()
            },
        }

    def finished(self, seconds: float, link: float) -> float:
        """Returns when the step ends, in seconds, if all exchanges pass one wire in turn, at `link` bytes a second.

        Python is assumed to be ahead of the device. A gather begins as soon as the weights gathered before it have been put in
        place, and the block that asks for it waits until it has ended. A scatter begins when the gradients are there, and
        nothing waits for it but the update.
        """
        clock = wire = used = 0.0
        gathers: list[float] = []
        for kind, _, nbytes, work in self:
            clock += work
            if kind == "use":
                clock = used = max(clock, gathers.pop(0))
                continue
            begin = max(wire, used if kind == "gather" else clock)
            wire = begin + nbytes / link
            if kind == "gather":
                gathers.append(wire)
            elif kind == "sum":
                clock = wire
        return max(clock + seconds - self._seconds, wire)


def divide(policy: FastWeightLM, count: int) -> Workers:
    """Divides a policy's weights among `count` workers, of which this process is the first."""
    with _disable_current_modes():  # a mesh has values
        if not dist.is_initialized():
            dist.init_process_group("fake", rank=0, world_size=count, store=fake.FakeStore())
        mesh = init_device_mesh("cuda", (count,))
    workers = Workers(0, count)
    with patch.object(sharding, "init_device_mesh", lambda *_: mesh):
        sharding.shard(policy, workers)
    return workers


@contextmanager
def gathered_weights(ledger: Ledger) -> Iterator[None]:
    """Tells the ledger of weights that FSDP2 gathers and frees, by which a storage changes its size."""
    allocate, free, buffer = _fsdp_param.alloc_storage, _fsdp_param.free_storage, _fsdp_collectives.DefaultAllocMixin

    def allocated(tensor: Tensor) -> None:
        allocate(tensor)
        ledger.resized(tensor)
        ledger.mark([tensor], GATHERED)

    def freed(tensor: Tensor) -> None:
        free(tensor)
        ledger.resized(tensor)

    original = buffer.allocate

    def buffered(self: Any, size: Any, **settings: Any) -> Tensor:
        found = original(self, size, **settings)
        ledger.mark([found], GATHERED)
        return found

    with (
        patch.object(_fsdp_param, "alloc_storage", allocated),
        patch.object(_fsdp_param, "free_storage", freed),
        patch.object(buffer, "allocate", buffered),
    ):
        yield
