"""Counts consecutive skipped steps; after three, ends the run and returns it to the state before the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from refine_lab.config import TrainConfig
from refine_lab.runs.checkpoints import checkpoints
from refine_lab.runs.durable import remove_folder

MOST = 3
"""Number of consecutive skipped steps that ends a run."""


class SkippedSteps:
    """Counts the last steps with a skipped update (see `refine_lab.method.step.OptimizerUpdate`)."""

    def __init__(self, run: Path, config: TrainConfig, before: pd.DataFrame, *, writes: bool = True) -> None:
        """`before` are the metrics of earlier steps, so that an interruption changes no count.

        A worker that does not write the run directory removes no checkpoint (`writes` is False).
        """
        self._run, self._config, self._writes = run, config, writes
        skipped = before["skipped_updates"].fillna(0) > 0 if "skipped_updates" in before else pd.Series(dtype=bool)
        self.count = int(skipped[::-1].cumprod().sum())

    def begins(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether a step is the first of those skipped and has changed no weight."""
        return not self.count and metrics.get("skipped_updates") == self._config.updates_per_batch

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Counts a step. Raises FloatingPointError for the third consecutive skipped step, or a skipped last step."""
        if not metrics.get("skipped_updates"):
            self.count = 0
            return
        self.count += 1
        if self.count < MOST and step < self._config.steps:
            return
        first, steps = step - self.count + 1, f"step {step}"
        if self.count > 1:
            steps = f"steps {first} to {step}"
        for number, folder in checkpoints(self._run):
            if number >= first and self._writes:
                remove_folder(folder)
        left = max((number for number, _ in checkpoints(self._run)), default=None)
        kept = "no checkpoint had been written by then" if left is None else f"the last checkpoint is from step {left}"
        norm = metrics.get("grad_norm", metrics.get("answer_grad_norm"))
        raise FloatingPointError(
            f"{steps} of {self._config.steps} made no update, because the loss or the gradient was not finite or "
            f"the gradient norm exceeded skip_above_grad_norm (gradient norm: {norm}); {kept}; "
            f"try an lr below {self._config.lr}, more warmup_steps, or dtype float32"
        )
