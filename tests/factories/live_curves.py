"""What the tests of live curves and others share."""

from __future__ import annotations

from pathlib import Path

from refine_lab.config import TrainConfig
from refine_lab.runs.writer import RunWriter


def new_run(folder: Path, method: str = "refine", seed: int = 0, steps: int = 8) -> RunWriter:
    refine = {"refine": None} if method == "sft" else {}
    config = TrainConfig(recipe="tiny", steps=steps, batch_size=2, mini_batch_size=2, seed=seed, **refine)
    return RunWriter.create(config, folder)


def train(writer: RunWriter, step: int, **values: float) -> None:
    rewards = {"reward_mean": 0.5, "reward_std": 0.2, "cosine_mean": 0.5, "cosine_std": 0.2}
    refine = rewards if writer.config.refine else {}
    writer.train(
        step, {"ntp_loss": 3 - step / 10, "ntp_accuracy": 0.25, "tokens_per_second": 5000.0, **refine, **values}
    )
