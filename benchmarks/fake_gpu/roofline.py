"""The roofline: the time of every launch from its bytes and its FLOPs, on one H200.

    device seconds = max(bytes / BANDWIDTH, FLOPs / peak of the dtype, LAUNCH)
    host seconds   = operations that Python or autograd starts, views included, times HOST

The device is assumed to reach these peaks with every launch, which is 15 to 25 % too high for a step in bfloat16. FLOPs are
those of torch's own counter. A Triton kernel counts with its bytes alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

BANDWIDTH = 3.9e12
"""Bytes a second."""
LAUNCH = 3.0e-6
"""Least seconds of a launch on the device."""
HOST = 7e-6
"""Seconds of the host for an operation."""
TRITON_HOST = 3
"""A Triton launch from Python costs the host about as much as three ordinary operations."""
PEAK = {torch.bfloat16: 650e12, torch.float16: 650e12, torch.float32: 50e12, torch.float64: 50e12}
"""FLOP/s that matrix products reach, by dtype; float32 without TF32."""
OTHER_PEAK = 50e12
CHUNK_SECONDS = 1.5e-6
"""Seconds of one chunk in a kernel that goes through a row's chunks one after the other; ours, not measured."""
CHUNK_TOKENS = 64
SEQUENTIAL = ("kernel_h_blockdim64", "kernel_dhu_blockdim64", "through_chunks")
"""Parts of the names of such kernels."""

NO_LAUNCH = frozenset(
    "view _unsafe_view t transpose permute select slice expand unsqueeze squeeze detach alias as_strided split "
    "split_with_sizes unbind diagonal _reshape_alias device empty empty_like new_empty empty_strided new_empty_strided "
    "lift_fresh is_pinned chunk unfold view_as set_ size _local_scalar_dense movedim narrow swapaxes".split()
)
"""Operations that start nothing on the device."""
NO_HOST = frozenset(("device", "size"))
"""Those of them that cost the host nothing."""
GATHERS = frozenset("index_select gather embedding index scatter_add index_add".split())
"""Operations that read only as much of an argument as they write."""


@dataclass
class Cost:
    """What a phase of the step costs."""

    launches: int = 0
    triton_launches: int = 0
    bytes: int = 0
    flops: float = 0.0
    device_seconds: float = 0.0
    host_operations: int = 0
    graphs: int = 0
    """Launches of CUDA graphs that start all operations of the phase; 0 if Python starts them one by one."""

    @property
    def started(self) -> int:
        """Returns the launches of the phase, each graph being one."""
        return self.graphs or self.launches

    @property
    def host_seconds(self) -> float:
        return (self.graphs or self.host_operations) * HOST

    @property
    def seconds(self) -> float:
        """Returns the seconds of the slower side: the device waits for launches, or the host runs ahead."""
        return max(self.device_seconds, self.host_seconds)


class Roofline:
    """Adds up the costs of a step by its phases."""

    def __init__(self) -> None:
        self.phases: dict[str, Cost] = defaultdict(Cost)

    def add(
        self,
        phase: str,
        func: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:
        """Counts one operation of torch and its tensors; one without a CUDA tensor costs nothing."""
        name, cost = func.overloadpacket.__name__, self.phases[phase]
        if name in NO_LAUNCH:
            cost.host_operations += name not in NO_HOST
            return
        tensors = inputs + results
        if not any(x.device.type == "cuda" for x in tensors):
            return
        moved, flops = _bytes(name, tensors, results), _flops(func, args, kwargs, results)
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
        cost.launches += 1
        cost.bytes += moved
        cost.flops += flops
        cost.device_seconds += max(moved / BANDWIDTH, flops / PEAK.get(dtype, OTHER_PEAK), LAUNCH)
        cost.host_operations += 1

    def add_triton(self, phase: str, name: str, arguments: Mapping[str, Any]) -> None:
        """Counts the launch of a Triton kernel."""
        tensors, cost = [x for x in arguments.values() if isinstance(x, Tensor)], self.phases[phase]
        moved = sum(x.nbytes for x in tensors)
        chunks = -(-arguments["T"] // CHUNK_TOKENS) if any(part in name for part in SEQUENTIAL) else 0
        cost.launches += 1
        cost.triton_launches += 1
        cost.bytes += moved
        cost.device_seconds += max(moved / BANDWIDTH, chunks * CHUNK_SECONDS, LAUNCH)
        cost.host_operations += TRITON_HOST

    @property
    def device_seconds(self) -> float:
        return sum(cost.device_seconds for cost in self.phases.values())

    def total(self, name: str) -> Any:
        return sum(getattr(cost, name) for cost in self.phases.values())


def _bytes(name: str, tensors: list[Tensor], results: list[Tensor]) -> int:
    """Returns the bytes of all arguments and results, each tensor once."""
    distinct = {id(x): x for x in tensors}.values()
    if name not in GATHERS:
        return sum(x.numel() * x.element_size() for x in distinct)
    most = max(x.numel() * x.element_size() for x in results)
    return sum(min(x.numel() * x.element_size(), most) for x in distinct)


def _flops(func: Any, args: tuple, kwargs: Mapping[str, Any], results: list[Tensor]) -> float:
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=results[0])


def tensors_of(*groups: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors in some arguments, those in their lists and tuples included."""
    found: list[Tensor] = []
    for group in groups:
        for x in group:
            if isinstance(x, Tensor):
                found.append(x)
            elif isinstance(x, (list, tuple)):
                found += tensors_of(x)
    return found
