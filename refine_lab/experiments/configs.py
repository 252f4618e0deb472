"""Builds the configurations of an experiment from a recipe, methods, seeds, and the model, text and prompts to use.

Names of files and folders become absolute paths. The prompts of test-time training are those that the model was not
trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from glob import glob
from typing import Any, TypeVar

from refine_lab import recipes
from refine_lab.config import RELEASE, RefineConfig, TaskConfig, TrainConfig, to_json
from refine_lab.data.sources import check_dataset
from refine_lab.data.tasks.trained import FREE_FIELDS, UNTRAINED, History, Trained
from refine_lab.method.rewards import reward_function
from refine_lab.models.hub import own_folder, resolve, shipped
from refine_lab.recipes.methods import UPDATES, applicable, known_method, split_updates
from refine_lab.text import quote
from refine_lab.training.history import history_of
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.types import RewardFunction, SelectionFunction
from refine_lab.validation import Config, ConfigError, path_of, require, unknown

C = TypeVar("C", bound=Config)
R = TypeVar("R", bound=TrainConfig | TTTRunConfig)

SEED = "{seed}"
"""Placeholder for the seed in a model's name."""

Reward = RewardFunction | str | None
"""A custom reward function, the name of a built-in one, or None for the recipe's."""

Selection = SelectionFunction | str | None
"""A custom selection function, the name of a built-in one, or None for the recipe's."""


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

    The recipe determines the phase; `phase`, if set, rejects recipes of other phases. `methods` defaults to those
    that the paper compares in the phase (see `recipes.methods.KNOWN` for all); test-time training creates `none` only
    once if all seeds share a model. `updates` is "equal", "release" or "compute".

    `settings` are fields of the configuration or of any configuration inside it; None keeps the recipe's value, and
    methods without that part ignore it (see `recipes.methods.applicable`), but one that no method with a next-sequence loss
    uses is rejected. In addition:

    - `model` containing `{seed}` is a separate model for each seed (`model_of_seed`);
    - `reward` and `selection` may be functions (`create_runs` stores their sources);
    - `selection` `memory` and `copy` also set `tau` and `margin` (`recipes.MEMORY`), unless those are set;
    - `data` is the only source of text; `task` is the source of a post-training task, whose `batch_size` and that of
      mid-training keep the recipe's number of updates per batch;
    - `rows` "document" also sets `min_tokens` to the sequence length, as in the paper's recipe, unless that is set;
    - `rollout_length` also sets `smoothing_kernel`, as in the paper's release, unless that is set;
    - `prompts` and `count` are what test-time training answers (`prompts_of`).

    Models, files and folders become absolute paths. Raises ValueError for repeated seeds, an unknown recipe, method or
    setting, and for every value that a configuration rejects.
    """
    require(len(set(seeds)) == len(seeds) > 0, "seeds", list(seeds), "one or more distinct integers")
    recipe, updates = _split_updates(recipe, updates)
    entry = recipes.recipe(recipe, phase)
    given = drop_none(**settings)
    settings = _resolved(given)
    model = settings.pop("model", None)
    histories = history_by_seed(model, seeds) if entry.phase == "ttt" else {}
    methods = recipes.METHODS[entry.phase] if methods is None else methods
    methods = sorted(methods, key=lambda name: name != "none")  # the baseline first
    known = [_method_updates(name, entry.phase, updates) for name in methods]
    require(len(set(known)) == len(methods) > 0, "methods", methods, "one or more distinct names of distinct methods")
    configs, before = [], []
    for seed in seeds:
        if model:
            settings["model"] = absolute_model(model_of_seed(model, seed))
        for name, own_updates in known:
            if name == "none" and seed != seeds[0] and SEED not in (model or ""):
                continue
            config = entry.make(name, seed)
            before.append(_refine_of(config))
            if isinstance(config, TTTRunConfig):
                config = _ttt_config(config, histories[seed], applicable(_refine_of(config), settings))
            else:
                config = _train_config(config, applicable(config.refine, settings))
            configs.append(_with_updates(config, own_updates))
    _require_effect({name: settings[name] for name in given if name in settings}, before, configs, methods)
    same = len(configs) - len({to_json(config) for config in configs})
    require(same == 0, "methods", methods, "methods that differ with these settings")
    return configs


def _require_effect(
    settings: Mapping[str, Any],
    before: Sequence[RefineConfig | None],
    configs: Sequence[Any],
    methods: Sequence[str],
) -> None:
    """Raises ConfigError for a setting of REFINE that no method uses, if any has a next-sequence loss.

    `before` are the recipes' own settings: a value that all of them have already is accepted.
    """
    pairs = [(old, new) for old, config in zip(before, configs, strict=True) if old and (new := _refine_of(config))]
    for name in sorted(setting_names(RefineConfig) & settings.keys()) if pairs else ():
        value = settings[name]
        used = any(new.uses(name) and getattr(new, name) == value for _, new in pairs)
        if not used and any(getattr(old, name) != value for old, _ in pairs):
            sentence = f"{name} {quote(settings[name])} has no effect on the methods {', '.join(methods)}; leave it out"
            raise ConfigError(name, settings[name], "none for these methods", sentence)


def _refine_of(config: TrainConfig | TTTRunConfig) -> RefineConfig | None:
    return (config.ttt and config.ttt.refine) if isinstance(config, TTTRunConfig) else config.refine


def _method_updates(name: str, phase: recipes.Phase, updates: str) -> tuple[str, str]:
    """Returns the name of a method in `recipes.methods.ORDER` without its suffix, and its updates."""
    known, own_updates = split_updates(known_method(name, phase))
    return known, own_updates or updates


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns an experiment's settings with names for custom functions and with the settings that others imply.

    Raises ValueError for an unknown reward.
    """
    found = dict(settings)
    if callable(found.get("selection")):
        found["selection"] = "custom"
    if found.get("selection") in ("memory", "copy"):
        found = {**recipes.MEMORY, **found}
    if callable(reward := found.get("reward")):
        found["reward"] = "custom"
    elif reward not in (None, "custom"):
        reward_function(reward)
    if "rollout_length" in found:
        found.setdefault("smoothing_kernel", found["rollout_length"])
    return found


def _with_updates(config: R, updates: str) -> R:
    change = {"release": recipes.release_updates, "compute": recipes.compute_updates}.get(updates)
    return config if change is None else change(config)


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
    nested = config.inner_configs()
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
    nested = kind.inner_configs()
    names = {field.name for field in fields(kind)} - nested.keys()  # type: ignore[arg-type]
    return frozenset(names.union(*map(setting_names, nested.values())))


def _split_updates(recipe: str, updates: str | None) -> tuple[str, str]:
    """Returns the recipe's name and the kind of updates; the old suffix of a name still works, with a warning."""
    if recipe.endswith(RELEASE):
        old, recipe, updates = recipe, recipe.removesuffix(RELEASE), "release"
        sentence = f"recipe {old!r} is now recipe {recipe!r} with updates 'release'; the old name will be removed"
        warnings.warn(sentence, FutureWarning, stacklevel=3)
    require(updates in (None, "equal", *UPDATES), "updates", updates, "'equal', 'release' or 'compute'")
    return recipe, updates or "equal"


def _train_config(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    require(settings.get("steps", 1) >= 1, "steps", settings.get("steps"), "at least 1")
    if "data" in settings:
        settings["sources"] = {absolute_source(settings.pop("data")): 1.0}
    if settings.get("rows") == "document":
        settings.setdefault("min_tokens", settings.get("sequence_length", config.data.sequence_length))
    if "batch_size" in settings:
        settings |= _batch_sizes(config, settings["batch_size"])
    if config.task is None:
        return with_settings(config, settings)
    require(settings.get("test") != 0, "test", 0, "at least 1, or none for all remaining examples")
    task = with_source(config.task, settings.pop("task", None), settings.pop("test_source", None))
    config = with_settings(replace(config, task=task), settings)
    assert config.task is not None
    return replace(config, task=config.task.settled())


def _batch_sizes(config: TrainConfig, batch_size: int) -> dict[str, int]:
    """Returns mini-batch and micro-batch sizes that keep the updates per batch of `config`."""
    updates = config.batch_size // config.mini_batch_size
    divisible = batch_size >= updates and batch_size % updates == 0
    allowed = f"a multiple of {updates}, the number of updates this recipe makes per batch"
    require(divisible, "batch_size", batch_size, allowed)
    mini = batch_size // updates
    return {"mini_batch_size": mini, "micro_batch_size": min(config.micro_batch_size, mini)}


def _ttt_config(config: TTTRunConfig, history: History, settings: dict[str, Any]) -> TTTRunConfig:
    prompts, count = settings.pop("prompts", None), settings.pop("count", None)
    changes = {name: settings.pop(name) for name in setting_names(TaskConfig) - {"test"} if name in settings}
    config = replace(config, **prompts_of(config, history, prompts, count, changes))
    if config.method == "sft":
        settings.pop("stop_at_reward", None)
    return with_settings(config, settings)


# -- model, text and prompts --------------------------------------------------------------------------------------------


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
    if name.startswith("datasets:"):
        check_dataset(name)
    if name == "python" or name.startswith(("recall:", "datasets:")):
        return name
    path = path_of("a source of text or prompts", name)
    return str(path.absolute()) if path.exists() else name


def with_source(task: TaskConfig, source: str | None, test_source: str | None = None) -> TaskConfig:
    """Returns a recipe's task with other sources, or its own if they are None, as absolute paths.

    The recipe's `answer_tokens` are kept only if the test examples have the recipe's format; other formats use the length
    of their longest reference answer.
    """
    test_sources = drop_none(test_source=test_source and absolute_source(test_source))
    changed = replace(task, source=absolute_source(source or task.source), **test_sources)
    return changed if changed.test_form == task.test_form else replace(changed, answer_tokens=None)


def model_of_seed(model: str, seed: int) -> str:
    """Returns the model's name with `{seed}` replaced; if it contains a `*`, the last folder that matches.

    Raises FileNotFoundError if none matches.
    """
    name = model.replace(SEED, str(seed))
    if "*" not in name:
        return name
    found = sorted(glob(str(path_of("the model", name))))
    if not found:
        raise FileNotFoundError(f"no folder matches the model pattern {quote(name)}")
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
            models = f"the models of seeds {first} and {seed} ({names[first]!r} and {names[seed]!r})"
            raise ValueError(f"{models} were trained on different prompts: start a separate evaluation for each seed")
    return histories


def prompts_of(
    config: TTTRunConfig, history: History, prompts: str | None, count: int | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields `task`, `data` and `count` of a run that answers prompts with a model with this `history`.

    Without `prompts`, or if a run in `history` divided them between training and test, the task is that run's, and its
    first `count` test prompts are answered. Otherwise it is the recipe's with `prompts` as its source.

    Raises ValueError for a value in `changes`, fields of `TaskConfig`, that would change the prompts of a run's task.
    """
    require(count is None or count >= 1, "count", count, "at least 1, or none for all")
    run = _run_with_task(history, prompts)
    if run is None:
        number = config.task.test if count is None and not prompts else count
        return {"task": replace(with_source(config.task, prompts), **changes, test=number).settled()}
    task = run.task
    if prompts is not None:  # the file may have moved
        field = "source" if task.test_source is None else "test_source"
        task = replace(task, **{field: absolute_source(prompts)})
    if task.test_form == "recall":  # no test example shares a key with a training example, however many there are
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
    divided = (each for each in history.trained if each.task.test_form != "file")
    return next((each for each in divided if each.same_source(source)), None)
