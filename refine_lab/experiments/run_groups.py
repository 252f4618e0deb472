"""Groups the runs that may be averaged: those whose configurations differ only in the seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_lab.config import Config, to_json

SEEDS = ("seed", "ttt.seed")
"""Settings in which the runs of one experiment differ."""
SEPARATOR = ": "
"""Separates a method from its experiment's distinguishing settings in names from `group_names`."""
MOST_NAMED = 3
"""Maximum number of settings in such a name."""

_DATE = re.compile(r"\d{8}-\d{6}")


def flat_settings(config: Config) -> dict[str, str]:
    """Returns every setting of a configuration by its dotted name, as JSON."""
    return dict(_flattened(json.loads(to_json(config))))


def group_names(runs: Sequence[tuple[str, Config, str]]) -> list[str]:
    """Returns, for each run given as method, configuration and folder name, the name under which it is averaged.

    Two runs get the same name only if they have the same method, the same settings except the seed, and different seeds.
    If a method has one such group, the name is the method. If it has several, the settings in which they differ follow, as
    in `refine: lr 0.001`, and if these do not distinguish the groups, the date of the group's first run.
    """
    by_method: dict[str, dict[tuple[Any, int], list[int]]] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for index, (method, config, _) in enumerate(runs):
        settings = tuple((name, value) for name, value in flat_settings(config).items() if name not in SEEDS)
        run = method, to_json(config)
        # A run with the settings and seed of an earlier one does not count as another seed.
        key = settings, repeats[run]
        by_method.setdefault(method, {}).setdefault(key, []).append(index)
        repeats[run] += 1
    names = [method for method, _, _ in runs]
    for method, groups in by_method.items():
        if len(groups) > 1:
            folders = [runs[first][2] for first, *_ in groups.values()]
            labels = _differences([dict(settings) for settings, _ in groups], folders)
            for label, members in zip(labels, groups.values(), strict=True):
                for index in members:
                    names[index] = f"{method}{SEPARATOR}{label}"
    return names


def _differences(settings: Sequence[Mapping[str, str]], folders: Sequence[str]) -> list[str]:
    """Describes the settings that distinguish each group from the others."""
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if len({each.get(name) for each in settings}) > 1][:MOST_NAMED]
    labels = [
        ", ".join(f"{setting_label(name)} {setting_text(each.get(name))}" for name in differing) for each in settings
    ]
    if len(set(labels)) < len(labels):
        dates = [found[0] if (found := _DATE.match(folder)) else folder for folder in folders]
        dates = dates if len(set(dates)) == len(dates) else folders
        labels = [", ".join(filter(None, pair)) for pair in zip(labels, dates, strict=True)]
    return labels


def setting_label(name: str) -> str:
    """Returns the last part of a flat setting's name; for a text source that is a path, the file's name."""
    before, found, source = name.partition("data.sources.")
    return Path(source).name or source if found and not before else name.rpartition(".")[2]


def setting_text(value: str | None) -> str:
    """Formats a setting's JSON for a label or a cell: strings without quotes, absolute paths by their last part."""
    if value is None:
        return "–"
    plain = json.loads(value)
    if not isinstance(plain, str):
        return "none" if plain is None else value
    return Path(plain).name if Path(plain).is_absolute() else plain


def _flattened(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", json.dumps(value, ensure_ascii=False)
