"""Functions of the post-training notebook: runs, and answers to the test questions before and after training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from refine_lab.config import TrainConfig
from refine_lab.data.tasks.examples import Example, Task
from refine_lab.data.tasks.scores import SCORES
from refine_lab.experiments.configs import Reward, Selection
from refine_lab.experiments.runs import check_inputs, function_sources, print_progress
from refine_lab.models.hub import resolve
from refine_lab.ops.precision import autocast
from refine_lab.runs.answers import AnswerLog
from refine_lab.runs.run import Run
from refine_lab.statistics.scores import NO_SEED
from refine_lab.training.answers import answer, answer_row
from refine_lab.training.inputs import inputs_of, resume_or_create
from refine_lab.training.loading import load_policy

AT_ONCE = 20
"""Number of questions after which answers are written."""


def task_runs(
    configs: Sequence[TrainConfig],
    task: Task,
    folder: Path,
    reward: Reward = None,
    selection: Selection = None,
    *,
    fresh: bool = False,
) -> list[Run]:
    """Returns, for each configuration, the newest run in `folder` with it, these examples and functions, or a new run.

    Prints the step from which each run continues. `fresh` creates new runs only.
    """
    check_inputs(configs)
    inputs, runs = inputs_of(configs[0].model, task.examples), []
    for config in configs:
        sources = function_sources(config, reward, selection)
        runs += resume_or_create([config], folder, inputs, fresh=fresh, **sources)
    print_progress(runs)
    return runs


def example_text(example: Example, config: TrainConfig, tokens: int = 60) -> str:
    """Returns the last `tokens` tokens of an example's prompt, and its accepted answers."""
    _, tokenizer = load_policy(config)
    return f"…{tokenizer.decode(list(example.prompt_ids[-tokens:]))}  →  {' | '.join(example.answers)}"


def answer_test_prompts(runs: Sequence[Run], task: Task) -> pd.DataFrame:
    """Returns the answers to every test question before training and after each run, with `method`, `seed` and `updates`.

    Those of the initial model are stored in `answers/base` of the first run, and those of the runs as by `final_answers`.
    """
    model, folder = runs[0].config.model, runs[0].path / "answers" / "base"
    frames = [_answered(runs[0].config, model, task, folder, "base", NO_SEED).assign(updates=0)]
    frames += [final_answers(run, task) for run in runs]
    return pd.concat(frames, ignore_index=True)


def final_answers(run: Run, task: Task) -> pd.DataFrame:
    """Returns the answers of a run's last checkpoint to every test question, with `method`, `seed` and `updates`.

    They are stored as they are generated, in `answers/test` of the run directory, each with the step of the checkpoint.
    Stored answers of the last checkpoint are reused; those of an earlier one are replaced.
    """
    checkpoint, metrics = resolve(str(run.path)), run.metrics()
    facts = task, run.path / "answers" / "test", run.config.method, run.config.seed
    frame = _answered(run.config, str(checkpoint), *facts, checkpoint)
    updates = metrics.loc[metrics["step"] <= _step(checkpoint), "updates"]
    return frame.assign(updates=int(updates.iloc[-1]))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _of_checkpoint(log: AnswerLog, checkpoint: Path | None) -> pd.DataFrame:
    """Returns the stored answers of a checkpoint, or all of them if it is None.

    Answers without a step, from an earlier version, are those of the checkpoint if their files are newer than it.
    """
    frame = log.read()
    if checkpoint is None:
        return frame
    files = [path.stat().st_mtime_ns for path in log.folder.glob("*.parquet")]
    newer = bool(files) and min(files) >= (checkpoint / "config.json").stat().st_mtime_ns
    steps = frame["step"] if "step" in frame else pd.Series(np.nan, index=frame.index)
    current = (steps == _step(checkpoint)) | (steps.isna() & newer)
    return frame[current].drop(columns="step", errors="ignore").reset_index(drop=True)


def _answered(
    config: TrainConfig,
    model: str,
    task: Task,
    folder: Path,
    method: str,
    seed: int,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    log = AnswerLog(folder)
    done = {*_of_checkpoint(log, checkpoint)["name"]}
    missing = [example for example in task.test if example.name not in done]
    if missing:
        policy, tokenizer = load_policy(config, model)
        for start in range(0, len(missing), AT_ONCE):
            part, began = missing[start : start + AT_ONCE], time.monotonic()
            with autocast(policy.device, config.dtype):
                texts = answer(policy, tokenizer, part, task.rule)
            facts = {"method": method, "seed": seed, "seconds": (time.monotonic() - began) / len(part)}
            step = {} if checkpoint is None else {"step": _step(checkpoint)}
            log.write([answer_row(example, text, **facts) | step for example, text in zip(part, texts, strict=True)])
    frame = _of_checkpoint(log, checkpoint)
    means = ", ".join(f"{name} {frame[name].mean():.3f}" for name in SCORES)
    print(f"{method}{'' if seed == NO_SEED else f' s{seed}'}: {len(frame)} answers, {means}")
    return frame
