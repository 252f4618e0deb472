"""The state of training, and an optimizer update on the gradients of several micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from refine_lab.config import UpdateConfig
from refine_lab.host import floats
from refine_lab.method.memory import check_window
from refine_lab.models.base import FastWeightLM
from refine_lab.ops.precision import autocast
from refine_lab.types import Batch, RewardFunction, Rollouts, SelectionFunction
from refine_lab.workers import ALONE, Workers, whole

C = TypeVar("C", bound=UpdateConfig)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainState(Generic[C]):
    """The state of training: the policy, the optimizers of its parameters, and what the losses need."""

    policy: FastWeightLM
    optimizers: Sequence[Optimizer]
    config: C
    reward: RewardFunction | None = None  # None without rollouts
    reference: FastWeightLM | None = None  # for kl_coef above 0
    selection: SelectionFunction | None = None  # for selection `custom`
    workers: Workers = ALONE  # the processes that share each update

    def __post_init__(self) -> None:
        check_window(self.config.refine, type(self.policy), self.policy.config)

    def autocast(self) -> AbstractContextManager:
        """Returns the autocast context of the run's steps and evaluations."""
        return autocast(self.policy.device, self.config.dtype)


@dataclass(frozen=True, eq=False)
class StepResult:
    """Metrics of a step, named as in metrics.jsonl, and its rollouts (none if the method samples none)."""

    metrics: dict[str, float]
    rollouts: Rollouts | None


class OptimizerUpdate:
    """One optimizer update: `add` accumulates the gradients of one micro-batch after another, `apply` changes the weights."""

    def __init__(self, train_state: TrainState) -> None:
        self._train_state = train_state
        self._finite: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        for optimizer in train_state.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's share of loss and metrics, which stay on the device."""
        for name, value in metrics.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._finite.append(torch.isfinite(loss.detach()))
        loss.backward()

    def apply(self) -> dict[str, float]:
        """Returns the sums of the metrics over all workers, and `grad_norm` before clipping; waits once for the device.

        If a loss or that norm is not finite, or the norm is above `config.skip_above_grad_norm`, no weight or moment
        changes, and `skipped_updates` is 1. The norm is NaN if a loss is not finite.
        """
        config, policy, workers = self._train_state.config, self._train_state.policy, self._train_state.workers
        workers.sum_gradients(policy.parameters())
        norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        finite = workers.every(torch.stack(self._finite).all())
        found = floats({**workers.sum_each(self._sums), "grad_norm": torch.where(finite, norm, math.nan)})
        norm = found["grad_norm"]
        if not math.isfinite(norm) or norm > (config.skip_above_grad_norm or math.inf):  # before the weights are lost
            return {**found, "skipped_updates": 1.0}
        for optimizer in self._train_state.optimizers:
            optimizer.step()
        return found


def split(batch: Batch, size: int, workers: Workers = ALONE) -> Iterator[tuple[int, Batch]]:
    """Yields this worker's rows of a batch, at most `size` at once, with the index of the first."""
    first, end = workers.share(len(batch.lengths))
    for start in range(first, end, size):
        yield start, batch.rows(start, min(start + size, end))
