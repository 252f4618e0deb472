"""Post-training as a notebook runs it: the three ways, their runs, and the answers to the test questions before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from refine_lab.config import RELEASE, TaskConfig, TrainConfig, require
from refine_lab.data.lessons import TaskData
from refine_lab.draws import Draws
from refine_lab.experiments import batch_sizes, check_inputs, given, load, located_model, located_source
from refine_lab.inputs import inputs_of, resume_or_create
from refine_lab.models.loading import manifest_of
from refine_lab.models.recompute import recompute
from refine_lab.nested import nested_step
from refine_lab.ops.precision import autocast
from refine_lab.optim import make_optimizers
from refine_lab.recipes import POSTTRAINING, WAYS, posttraining_recipe
from refine_lab.rewards import REWARDS, reward_function
from refine_lab.runs.answers import AnswerLog
from refine_lab.runs.run import Run
from refine_lab.step import Learner
from refine_lab.tasks.answers import answer, answer_row
from refine_lab.tasks.examples import Example, Task, load_task
from refine_lab.tasks.history import history_of

MEASURES = ("recall", "exact_match", "f1")
"""Of an answer beside its references, each from 0 to 1."""
NO_SEED = -1
"""Stands for the seed of a model before training."""
AT_ONCE = 20
"""Questions between two writings of their answers."""
TASK_FIELDS = (
    "train", "validation", "test", "prompt_tokens", "answer_tokens", "over_limit", "shared", "prompt_column", "answer_column",
    "lines", "strip_leading",
)  # fmt: skip
METHOD_FIELDS = ("reward", "num_chunks", "rollout_length", "nsp_coef")


def three_ways(
    recipe: str,
    seeds: Sequence[int],
    *,
    ways: Sequence[str] = WAYS,
    model: str | None = None,
    task: str | None = None,
    test_source: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    add_bos: bool | None = None,
    **others: Any,
) -> list[TrainConfig]:
    """Of each seed the ways of post-training, which differ in what comes before the update on the answers alone.

    None leaves the recipe's value; `test_source` is where the test examples come from, `others` are fields of `TaskConfig`,
    `RefineConfig` or `TrainConfig`. Raises ValueError for seeds that repeat, an unknown way and for every value that the
    configuration refuses.
    """
    require(len(set(seeds)) == len(seeds) > 0, "seeds", list(seeds), "at least one whole number, none twice")
    require(steps is None or steps >= 1, "steps", steps, "at least 1")
    require(others.get("test") != 0, "test", 0, "at least 1, or none for all that are left")
    if others.get("reward") is not None:
        reward_function(others["reward"])
    asked, method = ({name: others.pop(name, None) for name in names} for names in (TASK_FIELDS, METHOD_FIELDS))
    changes = given(model=model and located_model(model), steps=steps, **others)
    configs = []
    for seed in seeds:
        for way in ways:
            config = posttraining_recipe(recipe)(way, seed)
            assert config.task is not None
            asked_task = with_source(config.task, task, test_source=test_source and located_task(test_source))
            more: dict[str, Any] = {"task": replace(asked_task, **given(**asked)).settled()} | batch_sizes(
                config, batch_size
            )
            more["data"] = replace(config.data, **given(add_bos=add_bos))
            if config.method is not None:
                more["method"] = replace(config.method, **given(**method))
            configs.append(replace(config, **changes, **more))
    return configs


def release_way(recipe: str, seeds: Sequence[int], **others: Any) -> list[TrainConfig]:
    """Of each seed nested SFT with the one update a batch on the prompts that the paper's release makes.

    None for a recipe that has those already. Arguments as for `three_ways`. Raises ValueError where there is no such recipe.
    """
    if recipe.endswith(RELEASE):
        return []
    there = [name.removesuffix(RELEASE) for name in POSTTRAINING if name.endswith(RELEASE)]
    require(recipe in there, "recipe", recipe, f"one of {', '.join(there)} where the release's updates are asked for")
    return three_ways(recipe + RELEASE, seeds, **others, ways=("nested_sft",))


def with_source(task: TaskConfig, source: str | None, **others: Any) -> TaskConfig:
    """A recipe's task on another source, or on its own where that is none, for every folder it is read from.

    Its `answer_tokens` are for test examples of its own form: those of another form have what their longest reference answer
    needs.
    """
    other = replace(task, source=located_task(source or task.source), **given(**others))
    return other if other.asked_form == task.asked_form else replace(other, answer_tokens=None)


def located_task(source: str) -> str:
    """A task's source for every folder it is read from."""
    prefix, colon, rest = source.partition(":")
    if colon and prefix == "ruler":
        return f"ruler:{located_source(rest)}"
    return source if colon and prefix == "recall" else located_source(source)


def task_of(configs: Sequence[TrainConfig]) -> Task:
    """The examples of the configurations' one task, in the tokens of their model.

    Raises ValueError for prompts and answers that one of them cannot be trained on (see `TaskData`), and for test examples
    that their model was trained on already, unless `shared` allows it.
    """
    config = configs[0]
    assert config.task is not None
    _, tokenizer = load(config.model, config)
    task = load_task(config.task, tokenizer, config.data, manifest_of(config.model), history_of(config.model))
    for each in configs:
        TaskData(task.train, each.seed, each.method)
    return task


def runs_of(configs: Sequence[TrainConfig], task: Task, folder: Path) -> list[Run]:
    """For each configuration the newest run in `folder` with it, these examples and these weights, or a new one."""
    check_inputs(configs)
    return resume_or_create(configs, folder, inputs_of(configs[0].model, task.examples))


def example_text(example: Example, config: TrainConfig, tokens: int = 60) -> str:
    """The last `tokens` tokens of an example's prompt, and the answers any of which is right."""
    _, tokenizer = load(config.model, config)
    return f"…{tokenizer.decode(list(example.prompt_ids[-tokens:]))}  →  {' | '.join(example.answers)}"


def estimated_seconds(configs: Sequence[TrainConfig], task: Task) -> float:
    """How long training all of them takes here: a few rows are trained on in each way, on a copy, and multiplied.

    Without the answers to the test questions, and without starting processes: a guess for people.
    """
    seconds: dict[str, float] = {}
    for config in configs:
        if config.arm not in seconds:
            policy, _ = load(config.model, config)
            recompute(policy, config.recompute)
            rows = min(config.micro_batch_size, config.mini_batch_size)
            config = replace(config, batch_size=rows, mini_batch_size=rows, micro_batch_size=rows)
            reward = None if config.method is None else REWARDS[config.method.reward]
            learner = Learner(policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward)
            batch = TaskData(task.train, config.seed).batch(0, config.batch_size).to(policy.device)
            began = time.monotonic()
            nested_step(learner, batch, Draws(seed=config.seed, step=1))
            seconds[config.arm] = (time.monotonic() - began) / rows
            del policy, learner
            torch.cuda.empty_cache()  # the training process wants that memory
    return sum((config.steps * config.batch_size * seconds[config.arm] for config in configs), 0.0)


def answers_of(runs: Sequence[Run], task: Task) -> pd.DataFrame:
    """The answers to every test question before training and after each run, with `way`, `seed` and `updates`.

    They are kept in the run directories as they come, `answers/test` and, of the model that training started with,
    `answers/base` of the first run; what is answered is not answered again.
    """
    config = runs[0].config
    frames = [_answered(config.model, config, task, runs[0].path / "answers" / "base", "base", None, 0)]
    for run in runs:
        updates = int(run.metrics()["updates"].iloc[-1])
        there = run.path / "answers" / "test"
        frames.append(_answered(str(run.path), run.config, task, there, run.config.way, run.config.seed, updates))
    return pd.concat(frames, ignore_index=True)


def _answered(
    model: str, config: TrainConfig, task: Task, folder: Path, way: str, seed: int | None, updates: int
) -> pd.DataFrame:
    log = AnswerLog(folder)
    missing = [example for example in task.test if example.name not in log.done]
    if missing:
        policy, tokenizer = load(model, config)
        for start in range(0, len(missing), AT_ONCE):
            part, began = missing[start : start + AT_ONCE], time.monotonic()
            with autocast(policy.device, config.dtype):
                said = answer(policy, tokenizer, part, task.rule)
            seconds = (time.monotonic() - began) / len(part)
            who = {"way": way, "seed": NO_SEED if seed is None else seed, "seconds": seconds}
            log.write([answer_row(example, text, **who) for example, text in zip(part, said, strict=True)])
    frame = log.read()
    means = ", ".join(f"{name} {frame[name].mean():.3f}" for name in MEASURES)
    print(f"{way}{'' if seed is None else f' s{seed}'}: {len(frame)} answers, {means}")
    return frame.assign(updates=updates)


def per_run(answers: pd.DataFrame) -> pd.DataFrame:
    """A row a way and seed: the mean of each measure over the test questions."""
    return answers.groupby(["way", "updates", "seed"], sort=False)[list(MEASURES)].mean().reset_index()
