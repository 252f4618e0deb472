"""Checks the content of a run's `started.json` and `inputs.json`, which other programs can damage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine_lab.validation import require

HIGHEST = 10**9
"""Highest number of a run in its folder, and highest step in `started.json`."""


def check_started(path: Path, values: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the file, if a function, the parent or the changes in a `started.json` are malformed."""
    parent, changes = values.get("parent"), values.get("changes", [])
    fits = parent is None or _is_parent(parent)
    listed = isinstance(changes, list) and all(map(_is_change, changes))
    for name in ("reward", "selection"):  # the sources of custom functions
        source = values.get(name)
        require(source is None or isinstance(source, str), f"{name} of {path}", source, "text or null")
    require(fits, f"parent of {path}", parent, "null or an object with run and step")
    require(listed, f"changes of {path}", changes, "a list of objects, each with name, before, now and step")


def _is_parent(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("run"), str) and _is_step(value.get("step"))


def _is_change(value: Any) -> bool:
    named = isinstance(value, dict) and isinstance(value.get("name"), str)
    return named and {"before", "now"} <= value.keys() and _is_step(value.get("step"))


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= HIGHEST


def check_inputs(
    path: Path, values: Mapping[str, Any], config: Any, started: Mapping[str, Any], *, begun: bool
) -> None:
    """Raises ValueError, naming the file, if an `inputs.json` lacks what every run of this kind records in it.

    A run has `begun` if it has a checkpoint. Earlier versions had another digest of the model, and no `begins_with`.
    """
    texts, model = values.get("texts", {}), values.get("model", {})
    fits = isinstance(texts, dict) and all(isinstance(each, dict) for each in (model, *texts.values()))
    if not fits:
        raise ValueError(f"{path} is damaged: texts and model are not digests of files")
    names = ["texts"] if config.task is None else ["prompts", "prompts_digest"]
    if begun and started.get("number") and started.get("parent") is None:
        names.append("begins_with")
    missing = [name for name in names if values.get(name) is None]
    if not model and "weights_digest" not in values:
        missing.append("model")
    edited = any(change["name"].startswith("data") for change in started.get("changes", []))
    if config.task is None and "texts" in values and not edited:
        sources = [each for each in config.data.sources if begun or not each.startswith("datasets:")]
        missing += [f"texts of {each!r}" for each in sources if not texts.get(each)]
    if missing:
        raise ValueError(
            f"{path} is damaged: it has no {' and no '.join(missing)}, so the run's inputs cannot be compared with those "
            "that it started with; restore the file, or start a new run"
        )
