"""What the top of a saved page says: the model, the settings, and the result in one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import pandas as pd

from refine_lab.experiments.run_groups import flat_settings
from refine_lab.runs.run import Run
from widgets.core.page import About
from widgets.figures.series import method_styles
from widgets.figures.tables import Table

RUN_FACTS = {
    **{name: name for name in ("recipe", "model", "steps", "batch_size", "lr")},
    "data.sequence_length": "sequence_length",
    "task.source": "task",
    **{f"refine.{name}": name for name in ("reward", "rollout_length", "group_size", "num_chunks", "selection")},
}
"""Settings of runs at the top of a page, by their dotted names; the table of shared settings has all."""


def fields_about(
    conclusion: str,
    model: str,
    text: Sized,
    fields: Mapping[str, Any],
    more: Mapping[str, object] | None = None,
    values: Mapping[str, object] | None = None,
) -> About:
    """Returns what a page says of a panel: its model, how many tokens its text has, and its settings under their labels.

    `more`: facts after the model, by name. `values`: the settings that made what is shown, by the name of their field,
    since the fields may have been edited (see `field_values`); a field that it lacks is left out. None: those in the fields.
    The document is left out, since the page shows it, and so are fields without a label.
    """
    values = field_values(fields) if values is None else values
    labels = {name: getattr(field, "description", "") or getattr(field, "label", "") for name, field in fields.items()}
    shown = {label: values[name] for name, label in labels.items() if label and name in values and name != "document"}
    return About(conclusion=conclusion, facts={"model": model, **(more or {}), "tokens": f"{len(text):,}"} | shown)


def field_values(fields: Mapping[str, Any]) -> dict[str, object]:
    """Returns the current values of fields by their names, to be kept with what they make."""
    return {name: field.value for name, field in fields.items()}


def rollouts_sentence(rollouts: pd.DataFrame, reward: str) -> str:
    """Returns the mean reward and the exact-match rate of the rollouts at sampled positions; empty without rollouts."""
    sampled = rollouts[~rollouts["clicked"]] if len(rollouts) else rollouts
    if not len(sampled):
        return ""
    count = sampled["position"].nunique()
    return (
        f"{len(sampled):,} rollouts at {count} sampled position{'' if count == 1 else 's'} have a mean {reward} reward of "
        f"{sampled['reward'].mean():.3f} and an exact-match rate of {sampled['exact'].mean():.3g}."
    )


def run_facts(runs: Sequence[Run]) -> dict[str, object]:
    """Returns the methods, seeds and states of runs, and those of `RUN_FACTS` that they share."""
    methods = [style.label for style in method_styles(run.config.method for run in runs).values()]
    states = [run.state for run in runs]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    facts: dict[str, object] = {
        "runs": f"{len(runs)} ({', '.join(counts)})" if runs else "none selected",
        "methods": ", ".join(methods),
        "seeds": ", ".join(map(str, sorted({run.config.seed for run in runs}))),
    }
    shared = _shared(runs)
    return facts | {label: shared[name] for name, label in RUN_FACTS.items() if name in shared}


def shared_settings(runs: Sequence[Run]) -> Table:
    """Tabulates the settings that all runs share. Settings of a part that a method lacks are compared among the others."""
    rows = pd.DataFrame(_shared(runs).items(), columns=["setting", "value"])
    return Table(rows, "Settings that all selected runs share")


def _shared(runs: Sequence[Run]) -> dict[str, str]:
    flat = [flat_settings(run.config) for run in runs]
    values: dict[str, set[str]] = {}
    for settings in flat:
        for name, value in settings.items():
            values.setdefault(name, set()).add(value)
    return {name: _plain(*found) for name, found in values.items() if len(found) == 1 and found != {"null"}}


def _plain(text: str) -> str:
    value = json.loads(text)
    return value if isinstance(value, str) else text
