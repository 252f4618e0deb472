"""What the tests of run monitor and others share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refine_lab.config import TrainConfig
from refine_lab.runs.run import Run
from refine_lab.runs.schema import ROLLOUT_TYPES
from refine_lab.runs.writer import RunWriter

HOSTILE = "<img src=x onerror=alert(1)>"


def card_with(value: float) -> dict[str, Any]:
    """A result card with this score of a task, and with a task that could not run."""
    done = {"task": "niah_single_1", "length": 512, "metric": "score", "status": "done", "samples": 50}
    gap = {"task": HOSTILE, "length": None, "metric": "acc", "status": "missing", "reason": HOSTILE}
    card = {"date": "2026-02-16T10:00:00+00:00", "step": 4, "answers": "greedy", "ttt": "none"}
    return {**card, "tasks": [{**done, "value": value, "stderr": 0.0625, "different_samples": 48}, gap]}


def write_run(folder: Path, seed: int, lr: float = 1e-4, steps: int = 4) -> Run:
    """A finished run of REFINE with rollouts of every step."""
    config = TrainConfig(recipe="tiny", steps=steps, batch_size=2, mini_batch_size=2, seed=seed, lr=lr)
    with RunWriter.create(config, folder) as writer:
        for step in range(1, steps + 1):
            writer.train(
                step, {"ntp_loss": 3 - step / 10, "reward_mean": 0.5, "reward_std": 0.1, "tokens_per_second": 5000.0}
            )
            row = {
                "sequence_id": 0,
                "position": 20 + step,
                "sample_index": 0,
                "prefix_ids": [5, 6],
                "rollout_ids": [7, 8],
            }
            row |= {"target_ids": [7, 9], "logprobs": [-1.0, -2.0], "entropy": 1.0, "cosine": 0.5, "binary": 0.5}
            row |= {"reward": 0.5, "advantage": 0.0}
            writer.rollouts(step, {name: [row[name]] for name in ROLLOUT_TYPES})
        writer.flush()
        writer.status("finished")
        return writer.run
