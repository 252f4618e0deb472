"""Test-time training as a notebook runs it: the three ways, one prompt step by step, all prompts, and what came of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from refine_lab.config import RELEASE, TaskConfig, require
from refine_lab.environment import shown
from refine_lab.experiments import given, located_model
from refine_lab.inputs import inputs_of
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import load_model, manifest_of
from refine_lab.ops.precision import autocast
from refine_lab.posttraining import METHOD_FIELDS
from refine_lab.recipes import TTT_WAYS, release_updates, ttt_recipe
from refine_lab.rewards import reward_function
from refine_lab.tasks.answers import answer, answer_row
from refine_lab.tasks.examples import Example, Task, load_task
from refine_lab.tasks.history import history_of
from refine_lab.tasks.rules import AnswerRule
from refine_lab.tasks.trained import ANSWER_FIELDS
from refine_lab.ttt.adaptation import (
    Adapter,
    Reading,
    Restored,
    Update,
    adapted,
    prompt_batch,
    read_prompt,
)
from refine_lab.ttt.config import REWARDS, TTTConfig, TTTRunConfig
from refine_lab.ttt.records import TTTRun
from refine_lab.ttt.results import SCORES
from refine_lab.ttt.runs import Progress, adapt_ids, batches_of, check_prompts, example_of, measured, run_prompts
from refine_lab.ttt.splits import SEED, history_by_seed, of_seed, task_for

TASK_FIELDS = ("prompt_tokens", "over_limit", "prompt_column", "answer_column", "shared", *ANSWER_FIELDS)
TTT_FIELDS = ("steps", "lr", "stop_at_reward", "stop_at_loss", "dtype", "parameters")
NOTES = 5
"""Prompts too short for the whole method that are told of, at most."""
SECONDS_BETWEEN_LINES = 5.0


def three_ways(
    recipe: str,
    seeds: Sequence[int],
    *,
    ways: Sequence[str] = TTT_WAYS,
    model: str | None = None,
    prompts: str | None = None,
    count: int | None = None,
    add_bos: bool | None = None,
    **others: Any,
) -> list[TTTRunConfig]:
    """The model as it is, once, and of each seed SFT and REFINE on the prompts, which differ in the method.

    A `model` with `{seed}` in its name is another one for each seed (see `of_seed`), each also as it is. `prompts` is a
    `TaskConfig.source` and `count` how many are answered, None all of `prompts`. None leaves the recipe's value otherwise;
    `others` are fields of `TaskConfig`, `RefineConfig`, `TTTConfig` or `TTTRunConfig`. A model that a run post-trained
    answers that run's test prompts, where no others are named (`ttt.splits.task_for`). Raises ValueError for seeds that
    repeat, an unknown way or reward, models of several seeds that were trained on different prompts, and for every value
    that the configuration refuses.
    """
    require(len(set(seeds)) == len(seeds) > 0, "seeds", list(seeds), "at least one whole number, none twice")
    if (reward := others.get("reward")) is not None:
        known = ", ".join(map(repr, REWARDS))
        require(
            reward != "custom", "reward", reward, f"one of {known}: a function of your own is not kept by these runs"
        )
        reward_function(reward)
    parts = [{name: others.pop(name, None) for name in names} for names in (TASK_FIELDS, METHOD_FIELDS, TTT_FIELDS)]
    asked, method, ttt = (given(**part) for part in parts)
    pasts = history_by_seed(model, seeds)
    configs = []
    for seed in seeds:
        for way in ways:
            if way == "none" and seed != seeds[0] and SEED not in (model or ""):
                continue
            config = ttt_recipe(recipe.removesuffix(RELEASE))(way, seed)
            changes = task_for(config, pasts[seed], prompts, count, asked)
            if config.ttt is not None:
                changes["ttt"] = _changed(config.ttt, ttt, method)
            changes["data"] = replace(changes.get("data", config.data), **given(add_bos=add_bos))
            changes |= given(model=model and located_model(of_seed(model, seed)), **others)
            config = replace(config, **changes)
            configs.append(release_updates(config) if recipe.endswith(RELEASE) else config)
    return configs


def release_way(recipe: str, seeds: Sequence[int], **others: Any) -> list[TTTRunConfig]:
    """Of each seed SFT with the updates of the paper's release (`recipes.release_updates`); none where the recipe has those.

    Arguments and errors as for `three_ways`.
    """
    return [] if recipe.endswith(RELEASE) else three_ways(recipe + RELEASE, seeds, **others, ways=("sft",))


def _changed(config: TTTConfig, ttt: dict[str, Any], method: dict[str, Any]) -> TTTConfig:
    """With the values given; those that only REFINE has are left out of SFT."""
    if config.method is None:
        return replace(config, **{name: value for name, value in ttt.items() if name != "stop_at_reward"})
    return replace(config, **ttt, method=replace(config.method, **method))


def loaded(config: TTTRunConfig) -> tuple[FastWeightLM, PreTrainedTokenizerBase, Task]:
    """The model, its tokenizer, and the task in its tokens, its test examples those that are answered.

    Prompts that the model was trained on are left out, unless the task's `shared` allows them. Raises ValueError where there
    are no prompts, or fewer than `count`.
    """
    logging.disable_progress_bar()  # a widget for each of a second's work, blank where the notebook is only read
    model, tokenizer = load_model(config.model, device=config.device, seed=config.seed, settings=config.model_settings)
    manifest, past = manifest_of(config.model), history_of(config.model)
    task = load_task(config.task, tokenizer, config.data, manifest, past, leave_out=True)
    require(bool(task.test), "the number of prompts", len(task.test), "at least 1")
    if config.count is None:
        return model, tokenizer, task
    there = len(task.test)
    require(config.count <= there, "count", config.count, f"at most {there}, the prompts of the test split")
    first = f"The first {config.count} of {there} test prompts are answered."
    told = replace(task.report, notes=(*task.report.notes, first))
    return model, tokenizer, replace(task, test=task.test[: config.count], report=told)


def runs_of(
    configs: Sequence[TTTRunConfig],
    model: FastWeightLM,
    examples: Sequence[Example],
    folder: Path,
    *,
    fresh: bool = False,
) -> list[TTTRun]:
    """For each configuration the run in `folder` that is gone on from, or a new one; `fresh`: new ones.

    Prints what is answered already, which prompts are dropped, and which are too short for all chunks. Raises ValueError
    before anything is made for prompts that cannot be used.
    """
    notes = {note: None for config in configs for note in check_prompts(model, config, examples)}
    _, left_out = batches_of(examples, configs[0].batch_size)
    if left_out:
        size = configs[0].batch_size
        print(
            f"{len(left_out)} of {len(examples)} prompts are left out, since the last batch has fewer than {size} prompts."
        )
    for note in [*notes][:NOTES]:
        print(f"{note}.")
    if len(notes) > NOTES:
        print(f"The same applies to {len(notes) - NOTES} more prompts.")
    runs = []
    for config in configs:
        inputs = inputs_of(config.model, examples)
        run = TTTRun.create(config, inputs, folder) if fresh else TTTRun.taken_up(config, inputs, folder)
        done = len(run.log.done)
        print(f"{shown(run.path)}" + (f": {done} prompts already answered" if done else ""))
        runs.append(run)
    return runs


def estimated_seconds(
    runs: Sequence[TTTRun], model: FastWeightLM, tokenizer: PreTrainedTokenizerBase, task: Task
) -> float:
    """How long answering takes here: one prompt of middling length is adapted on and answered, and multiplied by length."""
    examples, seconds = task.test, {}
    middling = sorted(examples, key=lambda e: len(e.prompt_ids))[len(examples) // 2]
    total = 0.0
    for run in runs:
        config, done = run.config, run.log.done
        parts, _ = batches_of(examples, config.batch_size)
        tokens = sum(len(e.prompt_ids) for part in parts for e in part if e.name not in done)
        if tokens and config.way not in seconds:
            seconds[config.way] = _timed(config, model, tokenizer, middling, task.rule) / len(middling.prompt_ids)
        total += seconds.get(config.way, 0.0) * tokens
    return total


def _timed(
    config: TTTRunConfig, model: FastWeightLM, tokenizer: PreTrainedTokenizerBase, example: Example, rule: AnswerRule
) -> float:
    """Seconds of one prompt with all its steps, of which one is made."""
    step = 0.0
    with nullcontext() if config.ttt is None else Restored(model, config.ttt.parameters):
        if config.ttt is not None:
            adapter = Adapter(model, replace(config.ttt, steps=1))
            batch = prompt_batch(model, [adapt_ids(example, config.adapt_on)])
            step = config.ttt.steps * sum(update.seconds for update in adapter.adapt(batch))
        with autocast(model.device, config.dtype):
            began = time.monotonic()
            measured(model, example)
            reading = (time.monotonic() - began) * (1 if config.ttt is None else 2)
            began = time.monotonic()
            answer(model, tokenizer, [example], rule)
        return step + reading + time.monotonic() - began


# -- one prompt, step by step ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Watched:
    """What became of one prompt."""

    example: Example
    tokens: list[str]
    "The text of each token of the prompt, [T]."
    steps: pd.DataFrame
    "A row a step: `way`, `step`, `tokens_per_second`, `reward`, and loss and entropy before and after it (`loss_before`...)."
    answers: pd.DataFrame
    "A row a way: `way`, `answer` and scores; `none` is the answer before."
    readings: dict[str, Reading]
    "Entropy and loss of each token: `none` before, and of each way after its last step."


def prompt_to_watch(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TaskConfig,
    *,
    example: int = 0,
    text: str | None = None,
    question: str | None = None,
    add_bos: bool | None = None,
    **asked: Any,
) -> tuple[Example, AnswerRule]:
    """A text of one's own with its question (and a BOS token as `DataConfig.add_bos` says), or one of the task's test
    examples; and how it is answered.

    A question of one's own is answered as `AnswerRule` does by default; `asked` are values of `ANSWER_FIELDS` that differ, None
    where they do not. Raises ValueError for a question without a text, an example that there is not, and as `example_of` does.
    """
    if text is not None:
        names = {name: asked.get(name) for name in ("lines", "strip_leading")}
        return example_of(tokenizer, text, question, config, add_bos), AnswerRule(
            **given(max_tokens=asked.get("answer_tokens"), **names)
        )
    require(question is None, "question", question, "none without a text that it asks about")
    require(0 <= example < len(task.test), "example", example, f"from 0 to {len(task.test) - 1}")
    return task.test[example], task.rule


def watch(
    model: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    configs: Sequence[TTTRunConfig],
    rule: AnswerRule,
) -> Watched:
    """Adapt on one prompt alone in each way, tell of every step, answer, and restore. Raises ValueError as `adapted` does.

    The prompt is read and answered in the arithmetic of the ways that adapt, which have one dtype.
    """
    prompt = torch.tensor(example.prompt_ids)
    dtype = next((config.dtype for config in _adapting(configs)), "float32")

    def read() -> Reading:
        with autocast(model.device, dtype):
            return read_prompt(model, prompt)

    def say(way: str) -> None:
        with autocast(model.device, dtype):
            text = answer(model, tokenizer, [example], rule)[0]
        row = answer_row(example, text, way=way, seed=0, seconds=0.0)
        answers.append({name: row[name] for name in ("way", "answer", "references", *SCORES)})
        print(f"{way}: the answer is {text!r}", flush=True)

    first = read()
    readings, steps, answers = {"none": first}, [], []
    say("none")
    for config in _adapting(configs):
        assert config.ttt is not None
        ids, way, last = adapt_ids(example, config.adapt_on), config.way, [first]

        def tell(update: Update, way: str = way, last: list[Reading] = last) -> None:
            last.append(read())
            row = _step_row(way, update, *last[-2:])
            steps.append(row)
            print(_told(row), flush=True)

        with adapted(model, ids, config.ttt, tell):
            say(way)
        readings[way] = last[-1]
    texts = [str(tokenizer.decode([token])) for token in example.prompt_ids]
    return Watched(
        example=example,
        tokens=texts,
        steps=pd.DataFrame(steps),
        answers=pd.DataFrame(answers),
        readings=readings,
    )


def _adapting(configs: Sequence[TTTRunConfig]) -> Iterator[TTTRunConfig]:
    """Of each way that adapts the last configuration, whose model it is."""
    last = {config.way: config for config in configs if config.arm != "none"}
    yield from last.values()


def _step_row(way: str, update: Update, before: Reading, after: Reading) -> dict[str, Any]:
    return {
        "way": way,
        "step": update.number,
        "loss_before": float(before.losses.mean()),
        "loss_after": float(after.losses.mean()),
        "reward": update.metrics.get("reward_mean", float("nan")),
        "entropy_before": float(before.entropies.mean()),
        "entropy_after": float(after.entropies.mean()),
        "tokens_per_second": update.tokens_per_second,
    }


def _told(row: dict[str, Any]) -> str:
    """A step in a line."""
    changes = ", ".join(
        f"{name} {row[f'{name}_before']:.4f} -> {row[f'{name}_after']:.4f}" for name in ("loss", "entropy")
    )
    reward = "" if math.isnan(row["reward"]) else f", reward {row['reward']:.3f}"
    return f"{row['way']} step {row['step']}: {changes}{reward}, {row['tokens_per_second']:,.0f} tokens/s"


# -- all prompts -------------------------------------------------------------------------------------------------------


def answer_run(
    run: TTTRun,
    model: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    stop: Callable[[], object] = lambda: None,
) -> None:
    """Answer what is unanswered of a run, with a line of progress every few seconds, until `stop` gives anything."""
    name = f"{run.config.way} s{run.config.seed}"
    said = time.monotonic()

    def report(progress: Progress) -> bool:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            left = "" if progress.seconds_left is None else f", about {progress.seconds_left:.0f} s left"
            print(f"{name}: prompt batch {progress.batch} of {progress.batches}{left}", flush=True)
        return bool(stop())

    run_prompts(run, model, tokenizer, task.test, task.rule, report)
    answers = run.answers()
    scored = [score for score in SCORES if answers[score].notna().any()]
    means = "".join(f", {score} {answers[score].mean():.3f}" for score in scored)
    print(f"{name}: {len(answers)} answers{means}", flush=True)
