"""What a process does with a run of test-time training: load its model and task, and answer what is unanswered."""

from __future__ import annotations

from typing import Any

from refine_lab.inputs import inputs_of, refuse_changes
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.ttt.config import TTTRunConfig
from refine_lab.ttt.experiments import answer_run, loaded

_loaded: dict[str, Any] = {}
"""The model, tokenizer and task of the last run, which the next one may need too."""


def answer_prompts(run: Run, stop: StopSignal) -> None:
    """Answer all prompts of `run`, or until a stop is requested.

    Raises ValueError where its prompts or its model are others than it was begun with.
    """
    key = repr(_loads(run.config))
    if key not in _loaded:
        _loaded.clear()  # their memory is the next one's
        _loaded[key] = loaded(run.config)
    model, tokenizer, task = _loaded[key]
    refuse_changes(run, inputs_of(run.config.model, task.test))
    answer_run(run, model, tokenizer, task, stop.requested)


def _loads(config: TTTRunConfig) -> tuple[Any, ...]:
    """What a model and a task are loaded by."""
    drawn = config.seed if config.model.startswith("new:") else None
    return config.model, config.device, config.task, config.count, config.data, drawn
