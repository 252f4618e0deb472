"""The main function of a test-time training run: loads its model and task, and answers the unanswered prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from refine_lab.data.tasks.examples import Task
from refine_lab.data.tasks.scores import SCORES
from refine_lab.models.base import FastWeightLM
from refine_lab.ops.precision import use_tf32
from refine_lab.runs.child import StopSignal
from refine_lab.runs.files import write_json
from refine_lab.runs.run import Run
from refine_lab.runs.started import accept
from refine_lab.training.answering import run_prompts
from refine_lab.training.inputs import inputs_of, refuse_changes
from refine_lab.training.loading import load_prompts, require_finite
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.workers import ALONE, Workers

_loaded: dict[str, Any] = {}
"""Model, tokenizer and task of the last run, which the next one may also use."""


def answer_prompts(path: Path, stop: StopSignal, overrides: Collection[str] = (), workers: Workers = ALONE) -> None:
    """Answers all prompts of a run, or until a stop is requested. Each of several workers calls it.

    Raises ValueError if its prompts or its model have changed since it started, unless `overrides` accept that.
    """
    run = Run(path)
    key = repr(_loads(run.config))
    if key not in _loaded:
        _loaded.clear()  # the next model needs their memory
        _loaded[key] = load_prompts(run.config)
    model, tokenizer, task = _loaded[key]
    require_finite(model, run.config.model)
    use_tf32(model.device)
    with workers.first_alone():
        now = inputs_of(run.config.model, task.test)
        if accepted := refuse_changes(run, now, overrides):
            accept(run, accepted)
            write_json(run.path / "inputs.json", now)
    answer_run(run, model, tokenizer, task, stop.requested, workers)


def answer_run(
    run: Run,
    model: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    stop: Callable[[], object] = lambda: None,
    workers: Workers = ALONE,
) -> None:
    """Answers a run's unanswered prompts until `stop` returns a true value, and prints the mean of each score."""
    run_prompts(run, model, tokenizer, task.test, task.rule, lambda names, update: stop(), workers)
    if workers.first:
        print(_summary(run), flush=True)
    workers.wait()  # a worker that ends earlier counts as lost


def _summary(run: Run) -> str:
    """Returns the number of a run's answers and the mean of each score."""
    answers = run.answers()
    scored = [score for score in SCORES if answers[score].notna().any()]
    means = "".join(f", {score} {answers[score].mean():.3f}" for score in scored)
    return f"{run.config.method} s{run.config.seed}: {len(answers)} answers{means}"


def _loads(config: TTTRunConfig) -> tuple[Any, ...]:
    """Returns the settings that determine a model and a task."""
    drawn = config.seed if config.model.startswith("new:") else None
    return config.model, config.device, config.task, config.count, config.data, drawn
