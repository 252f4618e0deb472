"""Builds the configurations of an experiment from a recipe, the methods to compare, and seeds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, TypeVar

from refine_lab import recipes
from refine_lab.config import RELEASE, TaskConfig, TrainConfig
from refine_lab.data.tasks.trained import History
from refine_lab.experiments import tasks
from refine_lab.method.rewards import reward_function
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.types import RewardFunction
from refine_lab.validation import Config, require, unknown

C = TypeVar("C", bound=Config)
R = TypeVar("R", bound=TrainConfig | TTTRunConfig)

Reward = RewardFunction | str | None
"""A custom reward function, the name of a built-in one, or None for the recipe's."""


def method_configs(
    recipe: str,
    seeds: Sequence[int],
    *,
    phase: recipes.Phase | None = None,
    methods: Sequence[str] | None = None,
    updates: str | None = None,
    **settings: Any,
) -> list[Any]:
    """Returns a configuration of each method for each seed: `TrainConfig`, or `TTTRunConfig` for test-time training.

    The recipe determines the phase; `phase`, if given, refuses recipes of other phases. `methods` defaults to those
    that the phase compares; test-time training creates `none` only once if all seeds share a model. `updates` is
    "equal" or "release".

    `settings` are fields of the configuration or of any configuration inside it; None keeps the recipe's value, and
    methods without that part ignore it. In addition:

    - `model` containing `{seed}` is a separate model for each seed (`tasks.model_of_seed`);
    - `reward` may be a function (`create_runs` stores its source);
    - `data` is the only source of text; `task` is the source of a post-training task, whose `batch_size` and that of
      mid-training keep the recipe's number of updates per batch;
    - `prompts` and `count` are what test-time training answers (`tasks.prompts_of`).

    Models, files and folders become absolute paths. Raises ValueError for repeated seeds, an unknown recipe, method or
    setting, and for every value that a configuration refuses.
    """
    require(len(set(seeds)) == len(seeds) > 0, "seeds", list(seeds), "at least one whole number, none twice")
    recipe, updates = _split_updates(recipe, updates)
    entry = recipes.recipe(recipe, phase)
    settings = tasks.drop_none(**settings)
    if callable(reward := settings.get("reward")):
        settings["reward"] = "custom"
    elif reward not in (None, "custom"):
        reward_function(reward)
    model = settings.pop("model", None)
    histories = tasks.history_by_seed(model, seeds) if entry.phase == "ttt" else {}
    configs = []
    for seed in seeds:
        if model:
            settings["model"] = tasks.absolute_model(tasks.model_of_seed(model, seed))
        for name in methods or recipes.METHODS[entry.phase]:
            if name == "none" and seed != seeds[0] and tasks.SEED not in (model or ""):
                continue
            config = entry.make(name, seed)
            if isinstance(config, TTTRunConfig):
                config = _ttt_config(config, histories[seed], dict(settings))
            else:
                config = _train_config(config, dict(settings))
            configs.append(recipes.release_updates(config) if updates == "release" else config)
    return configs


def release_configs(configs: Sequence[R]) -> list[R]:
    """Returns those of `configs` whose method makes fewer updates in the paper's release, with these updates."""
    released = [(config, recipes.release_updates(config)) for config in configs if config.updates == "equal"]
    return [changed for config, changed in released if changed.method != config.method]


def with_settings(config: C, settings: Mapping[str, Any]) -> C:
    """Sets each setting in the field of that name of `config` or of a configuration inside it.

    A nested configuration that is None stays None, and settings of its fields are ignored. Raises ValueError for a name
    that is not a field of any.
    """
    if strange := next((name for name in settings if name not in setting_names(type(config))), None):
        raise unknown("setting", strange, sorted(setting_names(type(config))))
    nested = config.nested()
    names = {field.name for field in fields(config)} - nested.keys()  # type: ignore[arg-type]
    changes = {name: value for name, value in settings.items() if name in names}
    for name, kind in nested.items():
        inner = {key: value for key, value in settings.items() if key in setting_names(kind)}
        if inner and getattr(config, name) is not None:
            changes[name] = with_settings(getattr(config, name), inner)
    return replace(config, **changes)  # type: ignore[type-var]


@cache
def setting_names(kind: type[Config]) -> frozenset[str]:
    """Returns the field names of a configuration and of those inside it, without the fields that hold them."""
    nested = kind.nested()
    names = {field.name for field in fields(kind)} - nested.keys()  # type: ignore[arg-type]
    return frozenset(names.union(*map(setting_names, nested.values())))


def _split_updates(recipe: str, updates: str | None) -> tuple[str, str]:
    """Returns the recipe's name and the kind of updates; the old suffix of a name still works, with a warning."""
    if recipe.endswith(RELEASE):
        old, recipe, updates = recipe, recipe.removesuffix(RELEASE), "release"
        sentence = f"recipe {old!r} is now recipe {recipe!r} with updates 'release'; the old name will be removed"
        warnings.warn(sentence, FutureWarning, stacklevel=3)
    require(updates in (None, "equal", "release"), "updates", updates, "'equal' or 'release'")
    return recipe, updates or "equal"


def _train_config(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    require(settings.get("steps", 1) >= 1, "steps", settings.get("steps"), "at least 1")
    if "data" in settings:
        settings["sources"] = {tasks.absolute_source(settings.pop("data")): 1.0}
    if "batch_size" in settings:
        settings |= _batch_sizes(config, settings["batch_size"])
    if config.task is None:
        return with_settings(config, settings)
    require(settings.get("test") != 0, "test", 0, "at least 1, or none for all that are left")
    task = tasks.with_source(config.task, settings.pop("task", None), settings.pop("test_source", None))
    config = with_settings(replace(config, task=task), settings)
    assert config.task is not None
    return replace(config, task=config.task.settled())


def _batch_sizes(config: TrainConfig, batch_size: int) -> dict[str, int]:
    """Returns mini-batch and micro-batch sizes that keep the updates per batch of `config`."""
    updates = config.batch_size // config.mini_batch_size
    divisible = batch_size >= updates and batch_size % updates == 0
    require(divisible, "batch_size", batch_size, f"a multiple of {updates}, the updates this recipe makes of a batch")
    mini = batch_size // updates
    return {"mini_batch_size": mini, "micro_batch_size": min(config.micro_batch_size, mini)}


def _ttt_config(config: TTTRunConfig, history: History, settings: dict[str, Any]) -> TTTRunConfig:
    prompts, count = settings.pop("prompts", None), settings.pop("count", None)
    changes = {name: settings.pop(name) for name in setting_names(TaskConfig) - {"test"} if name in settings}
    config = replace(config, **tasks.prompts_of(config, history, prompts, count, changes))
    if config.method == "sft":
        settings.pop("stop_at_reward", None)
    return with_settings(config, settings)
