"""Which prompts a run of test-time training answers: none that its model was trained on.

A model that a run post-trained answers that run's own test prompts, so that nothing is divided a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from refine_lab.config import TaskConfig, require
from refine_lab.experiments import located_model
from refine_lab.posttraining import located_task, with_source
from refine_lab.tasks.history import history_of
from refine_lab.tasks.trained import FREE_FIELDS, UNTRAINED, History, Trained
from refine_lab.ttt.config import TTTRunConfig

SEED = "{seed}"
"""In a model's name: the seed."""


def of_seed(model: str, seed: int) -> str:
    """The model's name with the seed in the place of `{seed}`; where it has a `*`, the newest folder that it fits.

    Raises FileNotFoundError where it fits none.
    """
    name = model.replace(SEED, str(seed))
    if "*" not in name:
        return name
    found = sorted(glob(str(Path(name).expanduser())))
    if not found:
        raise FileNotFoundError(f"no folder fits the model {name!r}")
    return found[-1]


def history_by_seed(model: str | None, seeds: Sequence[int]) -> dict[int, History]:
    """The history of each seed's model; none is the recipe's.

    Raises ValueError where the models of several seeds were trained on different prompts: they have no test set in common.
    """
    if model is None:
        return dict.fromkeys(seeds, UNTRAINED)
    names = {seed: located_model(of_seed(model, seed)) for seed in seeds}
    known = {name: history_of(name) for name in dict.fromkeys(names.values())}
    first = seeds[0]
    for seed in seeds[1:]:
        if not known[names[first]].matches(known[names[seed]]):
            raise ValueError(
                f"the models of seeds {first} and {seed} were trained on different prompts ({names[first]!r} and "
                f"{names[seed]!r}): answer them one seed at a time"
            )
    return {seed: known[name] for seed, name in names.items()}


def task_for(
    config: TTTRunConfig, past: History, prompts: str | None, count: int | None, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """What `config` answers: its fields `task`, `data` and `count`, for a model with the history `past`.

    Without `prompts`, or with those that a run of `past` divided between training and test, it is that run's task, of which the
    first `count` test prompts are answered. Otherwise it is the recipe's task with `prompts` as its source.
    Raises ValueError for a value of `asked`, fields of `TaskConfig`, that would make other prompts of a run's task.
    """
    run = _run_with_task(past, prompts)
    if run is not None:
        task = run.task if prompts is None else replace(run.task, **_renamed(run.task, located_task(prompts)))
        if task.asked_form == "recall":  # no recall example for tests has a key of one to train on, whatever its length
            task = replace(task, test=max(count or 0, task.test or 0))
        else:
            _refuse_changes(run, asked)
        return {"task": replace(task, **asked).settled(), "data": run.data, "count": count}
    number = config.task.test if count is None and not prompts else count
    task = with_source(config.task, prompts)
    return {"task": replace(task, **asked, test=number).settled()}


def _renamed(task: TaskConfig, source: str) -> dict[str, str]:
    """The field of `task` that its test examples come from, with the path that is asked for: the file may have moved."""
    return {"source" if task.test_source is None else "test_source": source}


def _run_with_task(past: History, prompts: str | None) -> Trained | None:
    """The last run whose test prompts are asked for; none for a file of prompts, whose rows are told apart one by one."""
    if prompts is None:
        return next(iter(past.trained), None)
    source = located_task(prompts)
    divided = (each for each in past.trained if each.task.asked_form != "file")
    return next((each for each in divided if each.same_source(source)), None)


def _refuse_changes(run: Trained, asked: Mapping[str, Any]) -> None:
    for name, value in asked.items():
        own = getattr(run.task, name)
        if name not in FREE_FIELDS:
            reason = f"none or {own!r}, as in the run {run.run}, whose test prompts are answered"
            require(value == own, name, value, reason)
