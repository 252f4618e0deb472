"""Estimates how long an experiment takes on this machine by timing a part of each method's work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.config import TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.tasks.batches import TaskData
from refine_lab.data.tasks.examples import Task
from refine_lab.experiments.midtrain import documents_to_ask, measures
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import manifest_of
from refine_lab.ops.precision import autocast
from refine_lab.parity import parity
from refine_lab.rng import Draws
from refine_lab.runs.process import PYTHON, spawn
from refine_lab.runs.run import Run
from refine_lab.training.adaptation import adapt, preserve_weights
from refine_lab.training.answering import adapt_ids, batches_of, measured
from refine_lab.training.answers import answer
from refine_lab.training.evaluation import next_token
from refine_lab.training.loading import load_policy, load_prompts, load_training_task
from refine_lab.training.optim import make_optimizers
from refine_lab.training.posttraining import nested_step
from refine_lab.ttt_config import TTTRunConfig

ANSWERED = 8
"""Number of test questions that are answered for an estimate."""


def estimated_seconds(
    runs: Sequence[Run],
    task: Task,
    model: FastWeightLM | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Estimates the seconds that the remaining post-training or test-time training takes here, one run after another.

    Training is timed on a few prompts of each method, without answering the test questions. Test-time training is timed
    on one prompt of median length and scaled by token count, with `model` and `tokenizer`, or those that the
    configuration names. The estimate is rough: starting processes is not counted.
    """
    rates: dict[str, float] = {}
    total = 0.0
    for run in runs:
        config, amount = run.config, _remaining(run, task)
        if amount and config.method not in rates:
            if isinstance(config, TrainConfig):
                rates[config.method] = _seconds_per_prompt(config, task)
            else:
                if model is None or tokenizer is None:
                    model, tokenizer = load_policy(config)
                rates[config.method] = _seconds_per_token(config, model, tokenizer, task)
        total += rates.get(config.method, 0.0) * amount
    return total


def _remaining(run: Run, task: Task) -> int:
    """Returns the prompts that a run has yet to train on, or the tokens of prompts that it has yet to answer."""
    if run.kind == "train":
        return 0 if run.state == "finished" else run.config.steps * run.config.batch_size
    parts, _ = batches_of(task.test, run.config.batch_size)
    done = run.log.done
    return sum(len(example.prompt_ids) for part in parts for example in part if example.name not in done)


@dataclass(frozen=True)
class Rates:
    """How long a run takes, per unit of its work, and how many parameters its model has."""

    row: float
    "Seconds per sequence or prompt."
    evaluation: float
    "Seconds of one evaluation during training, if it was timed."
    parameters: int
    prompts: int = 0
    "Number of prompts of test-time training."

    def seconds(self, config: TrainConfig | TTTRunConfig) -> float:
        """Returns the seconds of a whole run."""
        if not isinstance(config, TrainConfig):
            return self.row * (self.prompts if config.count is None else config.count)
        evaluations = 1 + -(-config.steps // config.eval_every)
        measured = config.gradient_noise and config.refine is not None  # about a batch by REFINE and one by SFT
        noise = 2 * self.row * config.batch_size if measured else 0.0
        return self.row * config.steps * config.batch_size + (self.evaluation + noise) * evaluations


def training_rates(config: TrainConfig) -> Rates:
    """Times one micro-batch of training, after one that is not timed, and one evaluation on held-out text.

    The evaluations of a task are not timed. Loads or makes the tokens of the text, which the run uses as well.
    """
    policy, tokenizer = load_policy(config)
    parameters, evaluation = sum(each.numel() for each in policy.parameters()), 0.0
    if config.task is None:
        manifest = manifest_of(config.model)
        train, held_out = (
            SequenceData(config.data, tokenizer, config.seed, split, manifest) for split in ("train", "validation")
        )
        evaluation = _timed(lambda: next_token(policy, held_out.validation()))
        row = _seconds_per_row(config, policy, train)
    else:
        row = _seconds_per_prompt(config, load_training_task([config]))
    return Rates(row, evaluation, parameters)


def answering_rates(config: TTTRunConfig) -> Rates:
    """Times test-time training on one prompt, and its answer."""
    model, tokenizer, task = load_prompts(config)
    tokens = sum(len(example.prompt_ids) for example in task.test)
    seconds = _seconds_per_token(config, model, tokenizer, task) * tokens / len(task.test)
    return Rates(seconds, 0.0, sum(each.numel() for each in model.parameters()), len(task.test))


def notebook_rates(config: TrainConfig | TTTRunConfig) -> tuple[float, float]:
    """Times what a notebook does besides its runs: the parity gate, and the measures of one model at the end.

    For mid-training these are the measures of `midtrain.final_results`, for post-training the answers to the test
    questions; for test-time training they are part of the runs.
    """
    policy, tokenizer = load_policy(config)
    gate = _timed(lambda: parity(policy, autocast=config.dtype))
    if not isinstance(config, TrainConfig):
        return gate, 0.0
    if config.task is None:
        held_out = SequenceData(config.data, tokenizer, config.seed, "validation", manifest_of(config.model))
        documents = documents_to_ask(config, held_out)
        return gate, _timed(lambda: measures(policy, held_out, documents))
    task = load_training_task([config])
    part = task.test[:ANSWERED]
    return gate, _timed(lambda: answer(policy, tokenizer, part, task.rule)) / max(1, len(part)) * len(task.test)


@cache
def start_seconds() -> float:
    """Times the start of a Python process that loads what training needs."""
    with open(os.devnull, "wb") as output:
        return _timed(spawn([*PYTHON, "refine_lab.training.trainer"], output).wait)


def _seconds_per_row(config: TrainConfig, policy: FastWeightLM, data: SequenceData) -> float:
    checkpoint_activations(policy, config.activation_checkpointing)
    rows = min(config.micro_batch_size, config.mini_batch_size)
    config = replace(config, batch_size=rows, mini_batch_size=rows, micro_batch_size=rows)
    train_state = _train_state(policy, config)
    batch = data.batch(0, rows).to(policy.device)
    for step in (1, 2):  # the first one also starts threads and compiles kernels
        seconds = _timed(partial(train_step, train_state, batch, Draws(seed=config.seed, step=step)))
    return seconds / rows


def _train_state(policy: FastWeightLM, config: TrainConfig) -> TrainState[TrainConfig]:
    """Returns the state of a step to time; custom functions, whose source is not known here, are replaced by built-in ones."""
    refine, reward = config.refine, None
    if refine is not None:
        if refine.selection == "custom":
            refine = replace(
                refine, selection="memory", window=max(refine.window, policy.attention_window(policy.config))
            )
        reward, config = REWARDS.get(refine.reward, REWARDS["hybrid"]), replace(config, refine=refine)
    return TrainState(policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward)


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began


def _seconds_per_prompt(config: TrainConfig, task: Task) -> float:
    """Times one micro-batch of training, with a copy of the model."""
    policy, _ = load_policy(config)
    checkpoint_activations(policy, config.activation_checkpointing)
    rows = min(config.micro_batch_size, config.mini_batch_size)
    config = replace(config, batch_size=rows, mini_batch_size=rows, micro_batch_size=rows)
    train_state = _train_state(policy, config)
    batch = TaskData(task.train, config.seed).batch(0, rows).to(policy.device)
    began = time.monotonic()
    nested_step(train_state, batch, Draws(seed=config.seed, step=1))
    seconds = (time.monotonic() - began) / rows
    del policy, train_state
    torch.cuda.empty_cache()  # the training process needs that memory
    return seconds


def _seconds_per_token(
    config: TTTRunConfig, model: FastWeightLM, tokenizer: PreTrainedTokenizerBase, task: Task
) -> float:
    """Times a forward pass, one adaptation step and the answer for one median-length prompt; the model is restored."""
    example = sorted(task.test, key=lambda e: len(e.prompt_ids))[len(task.test) // 2]
    ttt, step = config.ttt, 0.0
    with nullcontext() if ttt is None else preserve_weights(model, ttt.parameters):
        if ttt is not None:
            (update,) = adapt(model, adapt_ids(example, config.adapt_on), replace(ttt, steps=1))
            step = ttt.steps * update.seconds
        with autocast(model.device, config.dtype):
            began = time.monotonic()
            measured(model, example)
            read = time.monotonic()
            answer(model, tokenizer, [example], task.rule)
            answered = time.monotonic()
    seconds = step + (read - began) * (1 if ttt is None else 2) + answered - read
    return seconds / len(example.prompt_ids)
