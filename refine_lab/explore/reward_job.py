"""Computes a custom reward in a thread of its own, position by position, so that it shows progress and can be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from refine_lab.method.custom import of_inputs
from refine_lab.types import RewardFunction, RewardInputs


class RewardJob:
    """One computation of a reward over the rollouts of several positions.

    `group_size`: rollouts per position. `progress` is called from the thread with the number of rewarded positions, first
    with 0. The future of `start` completes with None when the job is cancelled; the thread ends after the position that it
    is working on, since Python cannot interrupt a function.
    """

    def __init__(self, group_size: int, progress: Callable[[int], object]) -> None:
        self.group_size, self.progress = group_size, progress
        self.done = 0
        self.result: Future[Any] = Future()
        self._ended = False
        self._lock = threading.Lock()

    def by_position(self, reward: RewardFunction) -> RewardFunction:
        """Returns the reward computed for one position after the other, which stops when the job is cancelled."""
        compute = of_inputs(reward)

        @wraps(reward)
        def run(inputs: RewardInputs) -> Tensor:
            parts = []
            for first in range(0, len(inputs.rollout_ids), self.group_size):
                if self._ended:
                    raise RuntimeError("the computation was cancelled")  # nobody reads it
                part = inputs.map(lambda x, first=first: x[first : first + self.group_size])
                found = compute(part)
                if not isinstance(found, Tensor) or found.shape != part.rollout_ids.shape[:1]:
                    return found  # `rewards.checked` describes what is wrong with it
                parts.append(found)
                self.done += 1
                self._report()
            return torch.cat(parts)

        return run

    def start(self, compute: Callable[[], Any]) -> Future[Any]:
        """Calls `compute` in a new thread, and returns the future of its result."""

        def run() -> None:
            try:
                self._report()
                value = compute()
            except BaseException as error:  # the future raises it
                self._end(partial(self.result.set_exception, error))
            else:
                self._end(partial(self.result.set_result, value))

        threading.Thread(target=run, name="custom-reward", daemon=True).start()
        return self.result

    def cancel(self) -> bool:
        """Ends the job with the result None. Returns whether it was running."""
        return self._end(partial(self.result.set_result, None))

    def _report(self) -> None:
        if not self._ended:
            self.progress(self.done)

    def _end(self, end: Callable[[], None]) -> bool:
        with self._lock:
            running, self._ended = not self._ended, True
        if running:
            end()
        return running
