"""The training loop: trains according to a run directory's config.json, and writes only to that directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_lab.config import TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.corpus import Manifest
from refine_lab.data.tasks.batches import TaskData
from refine_lab.data.tasks.examples import load_task
from refine_lab.data.tasks.trained import History
from refine_lab.data.tokenizer import describe_beginning
from refine_lab.estimate.fit import print_shortage
from refine_lab.host import host
from refine_lab.method.custom_selection import selection_function
from refine_lab.method.rewards import reward_function
from refine_lab.method.step import TrainState, train_step
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import MANIFEST, manifest_of
from refine_lab.models.sharding import full_state, shard
from refine_lab.ops.precision import autocast, use_tf32
from refine_lab.rng import Draws
from refine_lab.runs.checkpoints import drop_checkpoints, resume_point, wait_for_checkpoint
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.runs.started import check_beginning, continues_after, sources_of
from refine_lab.runs.writer import NoWriter, RunProgress, RunWriter
from refine_lab.training import optim
from refine_lab.training.evaluation import answer_measures, next_token
from refine_lab.training.gradient_noise import noise_meter
from refine_lab.training.history import after, history_of, save_history
from refine_lab.training.inputs import inputs_of, settle, text_inputs
from refine_lab.training.key_tokens import key_tokens, key_tokens_of
from refine_lab.training.loading import load_policy, require_finite
from refine_lab.training.posttraining import nested_step
from refine_lab.training.prefetch import prefetched
from refine_lab.training.skipped import SkippedSteps
from refine_lab.training.utilisation import Utilisation
from refine_lab.types import Batch, PromptBatch, Rollouts
from refine_lab.workers import ALONE, Workers, is_sharded

PREFIX_TOKENS = 32
"""Number of prefix tokens stored with its rollouts."""

Evaluate = Callable[[Workers], dict[str, float]]
"""Evaluates the current weights on held-out data, which workers divide; returns nothing if there is none."""


def train(path: Path, stop: StopSignal, overrides: Collection[str] = (), workers: Workers = ALONE) -> None:
    """Trains a run to its last step or until a stop is requested, from its last checkpoint; `overrides` as in `settle`.

    Each of several workers calls it; the first one writes the run directory.
    """
    run = Run(path)
    config, (done, folder) = run.config, _starting_point(run, workers)
    if config.threads:
        torch.set_num_threads(config.threads)
    policy, tokenizer = load_policy(config, folder and str(folder))
    require_finite(policy, str(folder or config.model))
    checkpoint_activations(policy, config.activation_checkpointing)
    manifest, one_step = manifest_of(config.model), train_step if config.task is None else nested_step
    with workers.first_alone():
        if config.task is None:
            data, measure, history = _text(run, policy, tokenizer, manifest, overrides)
        else:
            data, measure, history = _task(run, policy, tokenizer, manifest, overrides)
    train_state = _train_state(run, config, policy, workers)
    evaluate = partial(_evaluate, train_state, measure, noise_meter(run, train_state, data))
    started, save = None if folder is None else done, partial(_save, train_state, tokenizer, manifest, history)

    with RunWriter.open(path, started) if workers.first else NoWriter(path) as writer:
        workers.wait()  # until the records end at that step
        if folder is None:
            evaluate(writer, 0)
        else:
            optim.load(train_state.optimizers, folder)
        before, progress = run.metrics(), RunProgress(writer, done)
        skipped, usage = SkippedSteps(path, config, before, writes=workers.first), Utilisation(policy, workers.count)
        past_tokens, tokens = int(before["tokens"].iloc[-1]) if len(before) else 0, 0
        step, reason, saved = done, None, time.monotonic()
        while step < config.steps and not (reason := _stop_reason(stop, workers)):
            step += 1
            usage.begin()
            optim.set_learning_rate(train_state.optimizers, lr := optim.learning_rate(config, step))
            batch = data.batch(step - 1, config.batch_size).to(policy.device)
            result = one_step(train_state, batch, Draws(seed=config.seed, step=step))
            if skipped.begins(result.metrics) and workers.decide(run.done != step - 1):
                saved = save(writer, step - 1)
            sequences = _sequences(batch, config.nested)
            tokens += sum(int(host(part.lengths).sum()) for part in sequences)
            counts = {"tokens": past_tokens + tokens, **usage.figures(sequences)}
            writer.train(step, {**counts, **result.metrics, "updates": step * config.updates_per_batch, "lr": lr})
            if result.rollouts is not None:
                writer.rollouts(step, rollout_rows(sequences[0], result.rollouts))
            progress.report(step, tokens)
            skipped.add(step, result.metrics)
            if step % config.eval_every == 0 or step == config.steps:
                evaluate(writer, step)
            minutes = (time.monotonic() - saved) / 60
            due = step % config.checkpoint_every == 0 or 0 < config.checkpoint_minutes <= minutes
            if workers.decide(due and not skipped.count):
                saved = save(writer, step)
        if workers.decide((run.latest_checkpoint() or (-1, None))[0] != step):
            save(writer, step)
        if error := reason and f"{reason}; saved after step {step} in checkpoints/step-{step}":
            print(error, flush=True)
        workers.wait()  # the others have nothing left to do: the run has not failed if one is lost from here on
        writer.status("stopped" if reason else "finished", step, error=error)


def _save(
    train_state: TrainState[TrainConfig],
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    history: History,
    writer: RunWriter | NoWriter,
    step: int,
) -> float:
    """Writes the checkpoint of a step, drops older ones, and returns the time; every worker must call it."""
    config, tensors = train_state.config, tensors_of(train_state)
    if isinstance(writer, RunWriter):
        with writer.checkpoint(step) as checkpoint:
            save_training(checkpoint, train_state, tokenizer, manifest, history, tensors)
        drop_checkpoints(writer.path, config.keep_checkpoints, config.keep_every)
    return time.monotonic()


def tensors_of(train_state: TrainState[TrainConfig]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the whole tensors of the policy and of the moments, sharded or not; every worker must call it."""
    return full_state(train_state.policy), optim.moments_of(train_state.optimizers)


def save_training(
    folder: Path,
    train_state: TrainState[TrainConfig],
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    history: History,
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    """Writes what training continues from, and a model that `load_model` reads, to the folder of a checkpoint.

    `tensors` are those that `tensors_of` has returned.
    """
    weights, moments = tensors
    train_state.policy.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if manifest is not None:
        manifest.save(folder / MANIFEST)
    save_history(history, folder)
    optim.save(train_state.optimizers, folder, moments)


def _starting_point(run: Run, workers: Workers) -> tuple[int, Path | None]:
    """Returns the step after which the run continues and the checkpoint of that step; (0, None) for a new run."""
    done, folder = 0, None
    if workers.first:
        check_beginning(run)
        done, folder = resume_point(run.path) or (0, None)
        continues_after(run, done)
        if folder is not None:
            print(f"The run continues from {folder.relative_to(run.path)}.", flush=True)
    step = workers.decide(-1 if folder is None else done)
    if workers.first:
        return done, folder
    return (0, None) if step < 0 else (step, wait_for_checkpoint(run.path, step))


def _stop_reason(stop: StopSignal, workers: Workers) -> str | None:
    """Returns why all workers should save and stop, or None."""
    reason = stop.requested()
    if workers.any(reason is not None):
        return reason or "another worker was asked to stop"
    return None


def _train_state(run: Run, config: TrainConfig, policy: FastWeightLM, workers: Workers) -> TrainState[TrainConfig]:
    """Returns the state of training, with the policy sharded over the workers if the configuration says so.

    On CUDA, prints a sentence first if a step will probably need more memory than there is.
    """
    if workers.first and policy.device.type == "cuda":
        print_shortage(config, policy, workers.count)
    if config.sharding == "full" and workers.count > 1:
        shard(policy, workers)
    refine, reference, reward, selection = config.refine, None, None, None
    if refine is not None:
        sources = sources_of(run.path)
        reward = reward_function(refine.reward, sources["reward"]) if refine.rolls_out else None
        if refine.selection == "custom":
            selection = selection_function(sources["selection"])
        if refine.kl_coef:  # the policy before the first step of training, also after a resumption
            reference, _ = load_policy(config)
            reference.requires_grad_(False)
    use_tf32(policy.device)
    optimizers = optim.make_optimizers(policy, config)
    functions = {"reward": reward, "selection": selection}
    common = {"policy": policy, "optimizers": optimizers, "config": config, "reference": reference}
    return TrainState(**common, **functions, workers=workers)


def _text(
    run: Run,
    policy: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    overrides: Collection[str],
) -> tuple[Any, Evaluate, History]:
    """Loads a run's text: its training batches, the function that evaluates the held-out rows, and the model's history."""
    config = run.config
    data, held_out = (
        SequenceData(config.data, tokenizer, seed=config.seed, split=split, manifest=manifest)
        for split in ("train", "validation")
    )
    tokens = {source: (data.tokens[source], held_out.tokens[source]) for source in config.data.sources}
    first_tokens = {"begins_with": list(data.beginning)}
    settle(run, text_inputs(config.model, config.data, manifest, tokens) | first_tokens, overrides)
    if sentence := describe_beginning(tokenizer, config.data.add_bos):
        print(sentence, flush=True)
    validation = held_out.validation()

    def choose() -> Bool[Tensor, "B S"]:
        begun = run.latest_checkpoint() is not None or run.parent is not None
        chooser = load_policy(config)[0] if begun else policy
        with autocast(chooser.device, config.dtype):
            return key_tokens(chooser, validation)

    keys = key_tokens_of(run, validation, choose)

    def measure(workers: Workers) -> dict[str, float]:
        return next_token(policy, validation, key_tokens=keys, workers=workers)

    return prefetched(data, policy.device), measure, history_of(config.model)


def _task(
    run: Run,
    policy: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    overrides: Collection[str],
) -> tuple[Any, Evaluate, History]:
    """Loads a run's task: its training batches, the function that evaluates validation examples, and the new history.

    Raises ValueError if the prompts or the initial weights have changed since the run started.
    """
    config = run.config
    history = history_of(config.model)
    task = load_task(config.task, tokenizer, config.data, manifest, history)
    print(task.report, flush=True)
    settle(run, inputs_of(config.model, task.examples), overrides)

    def measure(workers: Workers) -> dict[str, float]:
        if not task.validation:
            return {}
        return answer_measures(policy, tokenizer, task.validation, task.rule, workers=workers)

    data = prefetched(TaskData(task.train, config.seed, config.refine), policy.device)
    return data, measure, after(history, run, task.examples, task.train)


def _evaluate(
    train_state: TrainState,
    measure: Evaluate,
    noise: Callable[[int], dict[str, float]],
    writer: RunWriter | NoWriter,
    step: int,
) -> None:
    # workers that share the weights must use them equally often, so that each of them measures everything
    workers = ALONE if is_sharded(train_state.policy) else train_state.workers
    with train_state.autocast():
        measures = measure(workers)
    if measures := measures | noise(step):
        writer.evaluation(step, measures)


def _sequences(batch: Batch | PromptBatch, nested: bool) -> list[Batch]:
    """Returns the sequences that a step reads, beginning with those that it rolls out in."""
    return [batch] if isinstance(batch, Batch) else [batch.prompts] * nested + [batch.sequences]


def rollout_rows(batch: Batch, rollouts: Rollouts) -> dict[str, Any]:
    """Returns a batch's rollouts as the stored columns of `runs.schema.COLUMNS`, except `step`."""
    rollouts = rollouts.cpu()
    chunks, repeat = rollouts.positions.shape[1], rollouts.group_size
    row = torch.arange(len(batch.lengths)).repeat_interleave(chunks * repeat).tolist()
    position = rollouts.positions.flatten().repeat_interleave(repeat).tolist()
    tokens = host(batch.tokens).tolist()
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
