"""Resolves the model, text and prompts of a configuration: absolute paths, and only test prompts not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from refine_lab.config import TaskConfig, require
from refine_lab.data.tasks.trained import FREE_FIELDS, UNTRAINED, History, Trained
from refine_lab.models.hub import own_folder, resolve, shipped
from refine_lab.training.history import history_of
from refine_lab.ttt_config import TTTRunConfig

SEED = "{seed}"
"""Placeholder for the seed in a model's name."""


def drop_none(**values: Any) -> dict[str, Any]:
    """Returns the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def absolute_model(name: str) -> str:
    """Returns a model's name, with a folder as an absolute path; for a run, the path of its current last checkpoint."""
    bare = name.removeprefix("new:")
    if shipped(bare) or not own_folder(bare):
        return name
    return name[: -len(bare)] + str(resolve(bare).absolute())


def absolute_source(name: str) -> str:
    """Returns a source of text or prompts, with a file or folder as an absolute path."""
    kind, colon, rest = name.partition(":")
    if colon and kind == "ruler":
        return f"ruler:{absolute_source(rest)}"
    path = Path(name).expanduser()
    elsewhere = name == "python" or (colon and kind == "recall") or not path.exists()
    return name if elsewhere else str(path.absolute())


def with_source(task: TaskConfig, source: str | None, test_source: str | None = None) -> TaskConfig:
    """Returns a recipe's task with other sources, or its own if they are None, as absolute paths.

    The recipe's `answer_tokens` are kept only if the test examples have the recipe's form; other forms use the length
    of their longest reference answer.
    """
    other = drop_none(test_source=test_source and absolute_source(test_source))
    changed = replace(task, source=absolute_source(source or task.source), **other)
    return changed if changed.asked_form == task.asked_form else replace(changed, answer_tokens=None)


def model_of_seed(model: str, seed: int) -> str:
    """Returns the model's name with `{seed}` replaced; if it contains a `*`, the last folder that matches.

    Raises FileNotFoundError if none matches.
    """
    name = model.replace(SEED, str(seed))
    if "*" not in name:
        return name
    found = sorted(glob(str(Path(name).expanduser())))
    if not found:
        raise FileNotFoundError(f"no folder fits the model {name!r}")
    return found[-1]


def history_by_seed(model: str | None, seeds: Sequence[int]) -> dict[int, History]:
    """Returns what each seed's model was trained on; empty for None, the recipe's model.

    Raises ValueError if the models of several seeds were trained on different prompts, since they then have no common
    test set.
    """
    if model is None:
        return dict.fromkeys(seeds, UNTRAINED)
    names = {seed: absolute_model(model_of_seed(model, seed)) for seed in seeds}
    known = {name: history_of(name) for name in dict.fromkeys(names.values())}
    first = seeds[0]
    for seed in seeds[1:]:
        if not known[names[first]].matches(known[names[seed]]):
            raise ValueError(
                f"the models of seeds {first} and {seed} were trained on different prompts ({names[first]!r} and "
                f"{names[seed]!r}): answer them one seed at a time"
            )
    return {seed: known[name] for seed, name in names.items()}


def prompts_of(
    config: TTTRunConfig, past: History, prompts: str | None, count: int | None, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields `task`, `data` and `count` of a run that answers prompts with a model whose history is `past`.

    Without `prompts`, or if a run in `past` divided them between training and test, the task is that run's, and its
    first `count` test prompts are answered. Otherwise it is the recipe's with `prompts` as its source.

    Raises ValueError for a value in `asked`, fields of `TaskConfig`, that would change the prompts of a run's task.
    """
    run = _run_with_task(past, prompts)
    if run is None:
        number = config.task.test if count is None and not prompts else count
        return {"task": replace(with_source(config.task, prompts), **asked, test=number).settled()}
    task = run.task
    if prompts is not None:  # the file may have moved
        field = "source" if task.test_source is None else "test_source"
        task = replace(task, **{field: absolute_source(prompts)})
    if task.asked_form == "recall":  # no recall example for tests has a key of one to train on, whatever its length
        task = replace(task, test=max(count or 0, task.test or 0))
    else:
        for name, value in asked.items():
            own = getattr(run.task, name)
            allowed = f"none or {own!r}, as in the run {run.run}, whose test prompts are answered"
            require(name in FREE_FIELDS or value == own, name, value, allowed)
    return {"task": replace(task, **asked).settled(), "data": run.data, "count": count}


def _run_with_task(past: History, prompts: str | None) -> Trained | None:
    """Returns the last run whose test prompts are requested; None for a file of prompts, whose rows are checked one by one."""
    if prompts is None:
        return next(iter(past.trained), None)
    source = absolute_source(prompts)
    divided = (each for each in past.trained if each.task.asked_form != "file")
    return next((each for each in divided if each.same_source(source)), None)
