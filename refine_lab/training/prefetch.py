"""Prefetches training batches: the next one is made in a thread, in pinned memory, while the device works on this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


def prefetched(data: Any, device: torch.device) -> Any:
    """Returns `data` with the same batches, prefetched if the device is CUDA; on the CPU a thread would only compete."""
    return Prefetched(data, device) if device.type == "cuda" else data


class Prefetched:
    """The batches of `data`, all made by one thread; a batch that was not expected is made when it is asked for."""

    def __init__(self, data: Any, device: torch.device) -> None:
        self._data, self._device = data, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[tuple[int, int], Future[Any]] = {}

    def batch(self, step: int, batch_size: int) -> Any:
        """Returns batch `step`, and starts to make the next one."""
        key, following = (step, batch_size), (step + 1, batch_size)
        here = self._ahead.get(key) or self._start(key)
        self._ahead = {key: here, following: self._ahead.get(following) or self._start(following)}
        return here.result()

    def _start(self, key: tuple[int, int]) -> Future[Any]:
        return self._thread.submit(lambda: self._data.batch(*key).pinned(self._device))
