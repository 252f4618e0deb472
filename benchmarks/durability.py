"""Cost of durable records: of a step of the demo's `midtrain`, and of opening a run of 100,000 rollouts.

A pair is one training step, and what the run writes for it: a line of metrics, its rollouts, its status, and its shares of
a synced file of rollouts (every 10 steps) and of a checkpoint (every `checkpoint_every` steps). The share is the median over
pairs of the seconds of the writes over those of the step, with the interval between the order statistics that contain the
median with a probability of at least 95 %.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy.stats import binom
from transformers import PreTrainedTokenizerBase

from benchmarks.common import REPEATS, arguments, write
from benchmarks.step_cost import random_batch
from refine_lab.data.tasks.trained import History
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import load_model
from refine_lab.models.loading import manifest_of
from refine_lab.recipes import midtrain
from refine_lab.rng import Draws
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.optim import make_optimizers
from refine_lab.training.trainer import rollout_rows, save_training, tensors_of
from widgets.rollout_inspector import RolloutInspector

ROLLOUTS_EVERY = 10
ROLLOUTS, PER_STEP = 100_000, 64
BARS = {"share of a step": 0.05, "seconds to open": 1.0, "MB to open": 300.0}


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics, as far from the ends as each other, that contains the median at 95 %."""
    ordered, outside = sorted(values), int(binom.ppf(0.025, len(values), 0.5))
    low = max(0, outside - 1)
    return ordered[low], ordered[-1 - low]


def pairs(model: str, runs: Path, repeats: int) -> dict[str, Any]:
    """The step and its writes, `repeats` times in turn."""
    config = replace(midtrain(), model=model, steps=repeats)
    policy, tokenizer = load_model(model, device="cpu")
    state = TrainState(
        policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=REWARDS["cosine"]
    )
    batch, manifest = random_batch(policy, config.batch_size, config.data.sequence_length), manifest_of(model)
    train_step(state, batch, Draws(seed=0, step=0))
    parts: dict[str, list[float]] = {name: [] for name in ("step", "records", "rollout file", "checkpoint")}
    with RunWriter.create(config, runs) as writer:
        for step in range(1, repeats + 1):
            began = time.perf_counter()
            result = train_step(state, batch, Draws(seed=0, step=step))
            parts["step"].append(time.perf_counter() - began)
            rollouts = result.rollouts
            assert rollouts is not None

            def records(step: int = step, result: Any = result) -> None:
                writer.train(step, result.metrics)
                writer.status("running", step)

            def checkpoint(step: int = step) -> None:
                with writer.checkpoint(step) as folder:
                    save_training(folder, state, tokenizer, manifest, History(), tensors_of(state))

            parts["records"].append(seconds(records))
            for last in range(step * ROLLOUTS_EVERY - ROLLOUTS_EVERY + 1, step * ROLLOUTS_EVERY):
                writer.rollouts(last, rollout_rows(batch, rollouts))
            parts["rollout file"].append(seconds(writer.flush) / ROLLOUTS_EVERY)
            parts["records"][-1] += seconds(lambda r=rollouts: rollout_rows(batch, r))
            parts["checkpoint"].append(seconds(checkpoint) / config.checkpoint_every)
    shares = {
        name: [value / step for value, step in zip(values, parts["step"], strict=True)]
        for name, values in parts.items()
        if name != "step"
    }
    total = [float(sum(values)) for values in zip(*shares.values(), strict=True)]
    return {
        "share": statistics.median(total),
        "interval": median_interval(total),
        "shares": {name: statistics.median(values) for name, values in shares.items()},
        "seconds": {name: statistics.median(values) for name, values in parts.items()},
    }


def many_rollouts(runs: Path) -> Run:
    rng = np.random.default_rng(0)
    steps = -(-ROLLOUTS // PER_STEP)
    with RunWriter.create(replace(midtrain(), steps=steps), runs) as writer:
        for step in range(1, steps + 1):
            numbers = {
                name: rng.normal(size=PER_STEP) for name in ("entropy", "cosine", "binary", "reward", "advantage")
            }
            rows = {
                "sequence_id": step * 8 + np.repeat(np.arange(8), 8),
                "position": np.repeat(np.sort(rng.integers(0, 1000, 8)), 8),
                "sample_index": np.tile(np.arange(8), 8),
                "prefix_ids": np.repeat(rng.integers(0, 4000, (8, 32)), 8, axis=0),
                "rollout_ids": rng.integers(0, 4000, (PER_STEP, 5)),
                "target_ids": np.repeat(rng.integers(0, 4000, (8, 5)), 8, axis=0),
                "logprobs": rng.normal(size=(PER_STEP, 5)),
            }
            writer.rollouts(step, rows | numbers)
    return writer.run


def opening(run: Run, tokenizer: PreTrainedTokenizerBase, repeats: int) -> dict[str, Any]:
    """Seconds until the list of all rollouts is there, and the peak of memory above before."""
    RolloutInspector.of_run(run, tokenizer, [1]).close()  # what is imported first is not part of it
    process, taken, peaks = psutil.Process(), [], []
    for _ in range(repeats):
        before = float(process.memory_info().rss)
        peak, done = [before], threading.Event()

        def watch(peak: list[float] = peak, done: threading.Event = done) -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], float(process.memory_info().rss))

        thread = threading.Thread(target=watch)
        thread.start()
        wall, cpu = time.perf_counter(), time.process_time()
        inspector = RolloutInspector.of_run(run, tokenizer)
        text = repr(inspector)
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
        done.set()
        thread.join()
        peaks.append((peak[0] - before) / 1e6)
        inspector.close()
    print(text.splitlines()[0])
    walls, cpus = zip(*taken, strict=True)
    return {"seconds": statistics.median(walls), "cpu_seconds": statistics.median(cpus), "MB": max(peaks)}


def main() -> None:
    chosen = arguments(__doc__, REPEATS)
    repeats = chosen.repeats or 20
    with tempfile.TemporaryDirectory() as folder:
        cost = pairs(chosen.model, Path(folder), repeats)
        _, tokenizer = load_model(chosen.model, device="cpu")
        opened = opening(many_rollouts(Path(folder)), tokenizer, 5)
    measured = {"share of a step": cost["share"], "seconds to open": opened["seconds"], "MB to open": opened["MB"]}
    low, high = cost["interval"]
    print(f"writes of a step: {cost['share']:.2%} of it ({low:.2%} to {high:.2%}, {repeats} pairs)", cost["shares"])
    print(f"{ROLLOUTS:,} rollouts: {opened}")
    met = {name: value <= BARS[name] for name, value in measured.items()}
    print(met)
    figures = {"cost": cost, "opening": opened, "bars": BARS, "met": met}
    write(chosen.json, figures, model=Path(chosen.model).name, repeats=repeats, rollouts=ROLLOUTS)


if __name__ == "__main__":
    main()
