"""Loads what a configuration names: its model, tokenizer and task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from refine_lab.config import TrainConfig
from refine_lab.data.tasks.batches import TaskData
from refine_lab.data.tasks.examples import Task, load_task
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import load_model, manifest_of
from refine_lab.training.adaptation import trainable_parameters
from refine_lab.training.history import history_of
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import require


def load_policy(
    config: TrainConfig | TTTRunConfig, name: str | None = None
) -> tuple[FastWeightLM, PreTrainedTokenizerBase]:
    """Loads a configuration's model and tokenizer; `name` loads another model with the same device, seed and settings."""
    logging.disable_progress_bar()  # a widget for each of a second's work, blank where the notebook is only read
    settings = config.model_settings if isinstance(config, TrainConfig) else {}
    return load_model(name or config.model, device=config.device, seed=config.seed, settings=settings)


def require_finite(model: FastWeightLM, name: str) -> None:
    """Raises ValueError, naming a parameter, if a weight of the model that `name` refers to is NaN or infinite."""
    for parameter, values in model.named_parameters():
        if not (finite := values.isfinite()).all():
            count = int((~finite).sum())
            raise ValueError(
                f"{count} weights of {parameter!r} of the model {name!r} are NaN or infinite before training"
            )


def load_training_task(configs: Sequence[TrainConfig]) -> Task:
    """Loads the examples of the task that the configurations share, in the tokens of their model.

    Raises ValueError for prompts and answers that one of them cannot be trained on (see `TaskData`), and for test
    examples that their model was already trained on, unless `shared` allows it.
    """
    config = configs[0]
    assert config.task is not None
    _, tokenizer = load_policy(config)
    task = load_task(config.task, tokenizer, config.data, manifest_of(config.model), history_of(config.model))
    for each in configs:
        TaskData(task.train, each.seed, each.refine)
    return task


def load_prompts(config: TTTRunConfig) -> tuple[FastWeightLM, PreTrainedTokenizerBase, Task]:
    """Loads model, tokenizer and task of a test-time training run; the task's test examples are the prompts to answer.

    Prompts that the model was trained on are left out, unless the task's `shared` allows them. Raises ValueError if
    there are no prompts, or fewer than `count`.
    """
    model, tokenizer = load_policy(config)
    if config.ttt is not None:
        trainable_parameters(model, config.ttt.parameters)  # before the prompts are made
    manifest, past = manifest_of(config.model), history_of(config.model)
    task = load_task(config.task, tokenizer, config.data, manifest, past, leave_out=True)
    there = len(task.test)
    require(there > 0, "the number of prompts", there, "at least 1")
    if config.count is None:
        return model, tokenizer, task
    require(config.count <= there, "count", config.count, f"at most {there}, the prompts of the test split")
    first = f"The first {config.count} of {there} test prompts are answered."
    report = replace(task.report, notes=(*task.report.notes, first))
    return model, tokenizer, replace(task, test=task.test[: config.count], report=report)
