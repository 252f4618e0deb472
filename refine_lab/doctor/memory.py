"""Measures the memory of training steps, estimates it for a longer sequence, and reads how much is free.

A step's memory is linear in the length of its row: activations and states grow with it, and weights, gradients, moments
and rollouts do not. Two short steps therefore tell what a long one needs, before it is started.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine_lab.estimate.fit import MARGIN
from refine_lab.method.step import TrainState, train_step
from refine_lab.rng import Draws
from refine_lab.types import Batch

GIB = 2**30


class LiveMemory(TorchDispatchMode):
    """Adds up the bytes of all storages that operations create and that are still referenced; `peak` is their maximum.

    Storages that exist before the mode is entered do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor) and _is_new(x, args, kwargs)]
        for storage in new:
            if storage not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _is_new(x: Tensor, args: Any, kwargs: Any) -> bool:
    """Returns whether a result shares no storage with an argument, as views and results of in-place operations do."""
    pointers = {y.untyped_storage().data_ptr() for y in tree_leaves((args, kwargs)) if isinstance(y, Tensor)}
    return x.device.type != "meta" and x.untyped_storage().data_ptr() not in pointers


@dataclass(frozen=True)
class Usage:
    """Peak bytes of one step: until the optimizer begins, and during it; weights and moments count in both."""

    length: int
    gradients: int
    update: int

    @property
    def peak(self) -> int:
        return max(self.gradients, self.update)


@dataclass(frozen=True)
class Estimate:
    """A line through the peaks of two short steps, and the peak of the optimizer, which no length changes."""

    short: Usage
    long: Usage

    @property
    def per_token(self) -> float:
        return (self.long.gradients - self.short.gradients) / (self.long.length - self.short.length)

    def bytes(self, length: int) -> float:
        """Returns the estimated peak of a step on one row of `length` tokens."""
        gradients = self.short.gradients + self.per_token * (length - self.short.length)
        return max(gradients, self.short.update, self.long.update)

    def longest(self, free: int | float) -> int:
        """Returns the longest row whose step fits into `free` bytes with the margin, or 0 if none does."""
        room = free / MARGIN
        if room < max(self.short.update, self.long.update):
            return 0
        return max(0, int(self.short.length + (room - self.short.gradients) / self.per_token))


def usage_of(train_state: TrainState, batch: Batch, draws: Draws) -> tuple[Usage, Mapping[str, float]]:
    """Runs a step and returns its peak memory and its metrics.

    Memory is that of torch's allocator on CUDA, and of `LiveMemory` elsewhere. The optimizers must have their moments
    already, or those of this step do not count as in later ones.
    """
    device = train_state.policy.device
    before_update: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        hooks = _at_update(train_state, lambda: before_update.append(torch.cuda.max_memory_allocated(device)))
        metrics = train_step(train_state, batch, draws).metrics
        peak = torch.cuda.max_memory_allocated(device)
    else:
        held, live = _held(train_state), LiveMemory()
        hooks = _at_update(train_state, lambda: before_update.append(held + live.peak))
        with live:
            metrics = train_step(train_state, batch, draws).metrics
        peak = held + live.peak
    for hook in hooks:
        hook.remove()
    return Usage(batch.tokens.shape[1], before_update[0] if before_update else peak, peak), metrics


def _at_update(train_state: TrainState, note: Any) -> list[Any]:
    """Registers `note` to be called before the optimizers' updates."""
    return [each.register_step_pre_hook(lambda *_: note()) for each in train_state.optimizers]


def _held(train_state: TrainState) -> int:
    """Returns the bytes of weights, buffers and moments."""
    policy = train_state.policy
    moments = [x for o in train_state.optimizers for s in o.state.values() for x in s.values() if isinstance(x, Tensor)]
    tensors = {x.untyped_storage().data_ptr(): x for x in (*policy.parameters(), *policy.buffers(), *moments)}
    return sum(x.untyped_storage().nbytes() for x in tensors.values())


# -- what is free --------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Returns the free bytes of a CUDA device, or of this machine within the limit of its control group."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    candidates = [_of_machine()]
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))  # "max" without a limit: ValueError
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        candidates.append(limit - used + _fields(group / "memory.stat")["file"])
    return max(0, min(candidates))


def _of_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        return _fields(meminfo)["MemAvailable:"] * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS does not tell how much of it is free


def _fields(path: Path) -> dict[str, int]:
    """Returns the numbers of a file with one name and number a line."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
