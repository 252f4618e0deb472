"""The training loop: trains according to a run directory's config.json, and writes only to that directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig, TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.corpus import Manifest
from refine_lab.data.tasks.batches import TaskData
from refine_lab.data.tasks.examples import Task, load_task
from refine_lab.data.tasks.trained import History
from refine_lab.data.tokenizer import describe_beginning
from refine_lab.method.rewards import reward_function
from refine_lab.method.step import StepResult, TrainState, train_step
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.loading import MANIFEST, load_model, manifest_of
from refine_lab.rng import Draws
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunProgress, RunWriter
from refine_lab.training.evaluation import answer_measures, next_token
from refine_lab.training.history import after, history_of, save_history
from refine_lab.training.inputs import inputs_of, settle, text_inputs
from refine_lab.training.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    set_learning_rate,
)
from refine_lab.training.posttraining import nested_step
from refine_lab.types import Batch, Rollouts

PREFIX_TOKENS = 32
"""Number of prefix tokens stored with its rollouts."""


def train(path: Path, stop: StopSignal) -> None:
    """Trains the run in `path` to its last step, or until a stop is requested, resuming from its last checkpoint."""
    run = Run(path)
    config, (done, folder) = run.config, run.latest_checkpoint() or (0, None)
    if config.threads:
        torch.set_num_threads(config.threads)
    settings = config.model_settings
    policy, tokenizer = load_model(folder or config.model, device=config.device, seed=config.seed, settings=settings)
    checkpoint_activations(policy, config.activation_checkpointing)
    train_state = _train_state(run, config, policy)
    manifest = manifest_of(config.model)
    past = history_of(config.model)
    task = None if config.task is None else _task(run, config.task, tokenizer, manifest, past)
    if task is None:
        one_step, evaluate = _sequences(run, train_state, tokenizer, manifest)
    else:
        one_step, evaluate = _prompts(train_state, tokenizer, task)
    past = after(past, run, task)
    with RunWriter.open(path, None if folder is None else done) as writer:
        if folder is not None:
            load_optimizer_tensors(train_state.optimizers, load_file(folder / "optimizer.safetensors"))
        else:
            evaluate(writer, 0)
        progress = _Progress(writer, done)
        step = done
        for step in range(done + 1, config.steps + 1):
            if reason := stop.requested():
                step -= 1
                break
            _train_one(train_state, one_step, writer, progress, step)
            if step % config.eval_every == 0 or step == config.steps:
                evaluate(writer, step)
            if step % config.checkpoint_every == 0 and step < config.steps:
                _save(writer, step, train_state, tokenizer, manifest, past)
        else:
            reason = None
        if (run.latest_checkpoint() or (-1, None))[0] != step:
            _save(writer, step, train_state, tokenizer, manifest, past)
        writer.flush()
        writer.status("stopped" if reason else "finished", step, error=reason)


def _train_state(run: Run, config: TrainConfig, policy: Any) -> TrainState:
    refine, reference, reward = config.refine, None, None
    if refine is not None:
        source = run.path / "reward.py"
        reward = reward_function(refine.reward, source.read_text(encoding="utf-8") if source.is_file() else None)
        if refine.kl_coef:  # the policy that training started with, also after a resumption
            reference, _ = load_model(
                config.model, device=config.device, seed=config.seed, settings=config.model_settings
            )
            reference.requires_grad_(False)
    optimizers = make_optimizers(policy, config)
    return TrainState(policy=policy, optimizers=optimizers, config=config, reward=reward, reference=reference)


Step = Callable[[int], tuple[StepResult, Batch, int]]
"""Maps a batch's number, from 1, to its result, the sequences rolled out in, and the number of tokens read."""
Evaluate = Callable[[RunWriter, int], None]
"""Evaluates held-out data after the given number of batches, and writes the result."""


def _sequences(
    run: Run, train_state: TrainState, tokenizer: PreTrainedTokenizerBase, manifest: Manifest | None
) -> tuple[Step, Evaluate]:
    """Returns the step and evaluation functions for training on text, by SFT or REFINE."""
    config, policy = train_state.config, train_state.policy
    data, held_out = (
        SequenceData(config.data, tokenizer, seed=config.seed, split=split, manifest=manifest)
        for split in ("train", "validation")
    )
    tokens = {source: (data.tokens[source], held_out.tokens[source]) for source in config.data.sources}
    begins = {"begins_with": list(data.beginning)}
    settle(run, text_inputs(config.model, config.data, manifest, tokens) | begins)
    if told := describe_beginning(tokenizer, config.data.add_bos):
        print(told, flush=True)
    validation = held_out.validation()

    def one_step(step: int) -> tuple[StepResult, Batch, int]:
        batch = data.batch(step - 1, config.batch_size).to(policy.device)
        result = train_step(train_state, batch, Draws(seed=config.seed, step=step))
        return result, batch, int(batch.lengths.sum())

    def evaluate(writer: RunWriter, step: int) -> None:
        with train_state.autocast():
            writer.evaluation(step, next_token(policy, validation))

    return one_step, evaluate


def _task(
    run: Run, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, manifest: Manifest | None, past: History
) -> Task:
    """Loads the run's task. Raises ValueError if its prompts or weights have changed since it started."""
    task = load_task(config, tokenizer, run.config.data, manifest, past)
    print(task.report, flush=True)
    settle(run, inputs_of(run.config.model, task.examples))
    return task


def _prompts(train_state: TrainState, tokenizer: PreTrainedTokenizerBase, task: Task) -> tuple[Step, Evaluate]:
    """Returns the step and evaluation functions for post-training on prompts with answers."""
    config, policy = train_state.config, train_state.policy
    data = TaskData(task.train, config.seed, config.refine)

    def one_step(step: int) -> tuple[StepResult, Batch, int]:
        batch = data.batch(step - 1, config.batch_size).to(policy.device)
        result = nested_step(train_state, batch, Draws(seed=config.seed, step=step))
        inner = int(batch.prompts.lengths.sum()) if config.nested else 0
        return result, batch.prompts, inner + int(batch.sequences.lengths.sum())

    def evaluate(writer: RunWriter, step: int) -> None:
        if task.validation:
            with train_state.autocast():
                measured = answer_measures(policy, tokenizer, task.validation, task.rule)
            writer.evaluation(step, measured)

    return one_step, evaluate


def _train_one(train_state: TrainState, one_step: Step, writer: RunWriter, progress: _Progress, step: int) -> None:
    config, began = train_state.config, time.monotonic()
    lr = learning_rate(config, step)
    set_learning_rate(train_state.optimizers, lr)
    result, batch, tokens = one_step(step)
    progress.advance(tokens, time.monotonic() - began)
    metrics = {**result.metrics, "updates": step * config.updates_per_batch, "lr": lr}
    writer.train(step, {**progress.line(), **metrics})
    if result.rollouts is not None:
        writer.rollouts(step, rollout_rows(batch, result.rollouts))
    progress.report(step)


def rollout_rows(batch: Batch, rollouts: Rollouts) -> dict[str, Any]:
    """Returns a batch's rollouts as the stored columns of `runs.schema.COLUMNS`, except `step`."""
    chunks, repeat = rollouts.positions.shape[1], rollouts.group_size
    row = torch.arange(len(batch.lengths)).repeat_interleave(chunks * repeat).tolist()
    position = rollouts.positions.flatten().repeat_interleave(repeat).tolist()
    tokens = batch.tokens.tolist()
    return {
        "sequence_id": [batch.sequence_ids[r] for r in row],
        "position": position,
        "sample_index": torch.arange(repeat).repeat(len(row) // repeat).tolist(),
        "prefix_ids": [tokens[r][max(0, t + 1 - PREFIX_TOKENS) : t + 1] for r, t in zip(row, position, strict=True)],
        "rollout_ids": rollouts.tokens.tolist(),
        "target_ids": rollouts.target_ids.tolist(),
        "logprobs": rollouts.old_logprobs.tolist(),
        "entropy": rollouts.entropies.tolist(),
        "cosine": rollouts.cosine.tolist(),
        "binary": rollouts.binary.tolist(),
        "reward": rollouts.rewards.tolist(),
        "advantage": rollouts.advantages.tolist(),
    }


class _Progress:
    """Counts a run's tokens and seconds, for its metrics and its status."""

    def __init__(self, writer: RunWriter, done: int) -> None:
        before = writer.run.metrics()
        self.tokens = int(before["tokens"].iloc[-1]) if len(before) else 0
        self.here, self.last, self.status = 0, (0, 1.0), RunProgress(writer, done)

    def advance(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.here += tokens
        self.last = (tokens, seconds)

    def line(self) -> dict[str, float | int]:
        tokens, seconds = self.last
        return {"tokens": self.tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}

    def report(self, step: int) -> None:
        self.status.report(step, self.here)


def _save(
    writer: RunWriter,
    step: int,
    train_state: TrainState,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    past: History,
) -> None:
    with writer.checkpoint(step) as folder:
        train_state.policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if manifest is not None:
            manifest.save(folder / MANIFEST)
        save_history(past, folder)
        save_file(optimizer_tensors(train_state.optimizers), folder / "optimizer.safetensors")
