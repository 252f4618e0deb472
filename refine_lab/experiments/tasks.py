"""Resolves the model, text and prompts of a configuration: absolute paths, and only test prompts not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from refine_lab.config import TaskConfig
from refine_lab.data.tasks.trained import FREE_FIELDS, UNTRAINED, History, Trained
from refine_lab.models.hub import own_folder, shipped
from refine_lab.models.loading import resolve
from refine_lab.training.history import history_of
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import require

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
    if name.startswith("ruler:"):
        return f"ruler:{absolute_source(name.removeprefix('ruler:'))}"
    path = Path(name).expanduser()
    return name if name == "python" or name.startswith("recall:") or not path.exists() else str(path.absolute())


def with_source(task: TaskConfig, source: str | None, test_source: str | None = None) -> TaskConfig:
    """Returns a recipe's task with other sources, or its own if they are None, as absolute paths.

    The recipe's `answer_tokens` are kept only if the test examples have the recipe's form; other forms use the length
    of their longest reference answer.
    """
    test_sources = drop_none(test_source=test_source and absolute_source(test_source))
    changed = replace(task, source=absolute_source(source or task.source), **test_sources)
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
    by_name = {name: history_of(name) for name in dict.fromkeys(names.values())}
    histories = {seed: by_name[name] for seed, name in names.items()}
    first = seeds[0]
    for seed in seeds[1:]:
        if not histories[first].matches(histories[seed]):
            raise ValueError(
                f"the models of seeds {first} and {seed} were trained on different prompts ({names[first]!r} and "
                f"{names[seed]!r}): answer them one seed at a time"
            )
    return histories


def prompts_of(
    config: TTTRunConfig, history: History, prompts: str | None, count: int | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields `task`, `data` and `count` of a run that answers prompts with a model with this `history`.

    Without `prompts`, or if a run in `history` divided them between training and test, the task is that run's, and its
    first `count` test prompts are answered. Otherwise it is the recipe's with `prompts` as its source.

    Raises ValueError for a value in `changes`, fields of `TaskConfig`, that would change the prompts of a run's task.
    """
    run = _run_with_task(history, prompts)
    if run is None:
        number = config.task.test if count is None and not prompts else count
        return {"task": replace(with_source(config.task, prompts), **changes, test=number).settled()}
    task = run.task
    if prompts is not None:  # the file may have moved
        field = "source" if task.test_source is None else "test_source"
        task = replace(task, **{field: absolute_source(prompts)})
    if task.asked_form == "recall":  # no test example shares a key with a training example, however many there are
        task = replace(task, test=max(count or 0, task.test or 0))
    else:
        for name, value in changes.items():
            recorded = getattr(run.task, name)
            allowed = f"none or {recorded!r}, as in the run {run.run}, whose test prompts are answered"
            require(name in FREE_FIELDS or value == recorded, name, value, allowed)
    return {"task": replace(task, **changes).settled(), "data": run.data, "count": count}


def _run_with_task(history: History, prompts: str | None) -> Trained | None:
    """Returns the last run whose test prompts are requested; None for a file of prompts, whose rows are checked one by one."""
    if prompts is None:
        return next(iter(history.trained), None)
    source = absolute_source(prompts)
    divided = (each for each in history.trained if each.task.asked_form != "file")
    return next((each for each in divided if each.same_source(source)), None)
