"""The rows of the run table: state, progress, last metrics and differing settings of each run, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_lab.experiments.run_groups import SEEDS, flat_settings, setting_label, setting_text
from refine_lab.runs.checkpoints import checkpoints
from refine_lab.text import printable
from widgets.figures.method_sentences import method_sentence
from widgets.figures.series import COLOURS, looks_like, method_styles
from widgets.parts.follower import RunReader

STOPPED = "a stop was requested"
"""Beginning of the error in `status.json` of a run that a person has stopped."""

STATES = {"starting": "queued", "waiting": "not started", "killed": "failed"}
"""State of a run (`Run.state`) -> its name on the page, where that is another."""

BAD = ("failed", "unreadable")
"""States, as named on the page, that are an error."""

NO_PROCESS = "its process ended without saving; Start resumes the run"
"""Explanation of the state `killed`."""

MOST_SETTINGS = 40
"""Maximum number of columns of settings."""


BOOKKEEPING = (
    *("eval_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every", "threads", "device"),
    *("micro_batch_size", "ttt.micro_batch_size", "activation_checkpointing"),
)
"""Settings that do not change what is trained; their columns come last."""


class Metric(NamedTuple):
    """A column with the last value of a quantity, multiplied by `scale`."""

    heading: str
    kind: str
    key: str
    scale: int = 1


REWARD = Metric("{} reward", "train", "reward_mean")
"""A column for each kind of reward that a run is trained with: rewards of different kinds cannot be compared."""

RECALL = "exact recall (%)"
"""Heading of the column by which the run monitor orders its rows at first, if there is recall."""

METRICS = (
    Metric(RECALL, "recall", "exact_recall", 100),
    Metric("NTP loss", "train", "ntp_loss"),
    REWARD,
    Metric("held-out loss", "eval", "ntp_loss"),
    Metric("held-out accuracy (%)", "eval", "ntp_accuracy", 100),
    Metric("held-out LongPPL", "eval", "long_ppl"),
    Metric("answer loss", "train", "answer_loss"),
    Metric("held-out contains answer (%)", "eval", "contains_answer", 100),
    Metric("contains answer (%)", "answers", "contains_answer", 100),
)
"""Columns of metrics, in order."""


def shown_state(state: str, error: str) -> tuple[str, str, str]:
    """Returns a state's name on the page, an error to show in red, and a quiet remark; the last two may be empty."""
    if state == "stopped":
        return ("stopped by you", "", error.removeprefix(STOPPED).removeprefix("; ")) if error.startswith(STOPPED) else (
            "stopped", "", error
        )  # fmt: skip
    if state == "killed":
        return STATES[state], error or NO_PROCESS, ""
    return STATES.get(state, state), error, ""


def last_metrics(reader: RunReader) -> dict[str, float]:
    """Returns the last finite value of each of `METRICS` that a run has, by heading, in the unit of the heading."""
    found = {}
    for metric in METRICS:
        frame = reader.frames[metric.kind]
        values = frame[metric.key].dropna().to_numpy(float) if metric.key in frame else np.empty(0)
        if len(values) and math.isfinite(last := float(values[-1])):
            found[_heading(metric, reader)] = last * metric.scale
    return found


def metric_headings(readers: Sequence[RunReader]) -> list[str]:
    """Returns the headings of `METRICS` for these runs, in order."""
    known = [reader for reader in readers if reader.config is not None]
    return [*dict.fromkeys(_heading(metric, reader) for metric in METRICS for reader in known)]


def _heading(metric: Metric, reader: RunReader) -> str:
    """Returns a metric's heading for a run; that of the reward names its kind."""
    if metric is not REWARD:
        return metric.heading
    config: Any = reader.config
    refine = getattr(config, "refine", None)
    return printable(metric.heading.format(refine.reward if refine is not None else "training"))


def experiment_of(reader: RunReader) -> str:
    """Returns the name of a run's experiment: its recipe and the model it starts from, without dates and seeds."""
    config: Any = reader.config
    if config is None:
        return "unreadable"
    path = Path(config.model)
    if not path.is_absolute():
        return printable(f"{config.recipe}, from {config.model}")
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    dated = re.fullmatch(r"\d{8}-\d{6}-(.+)-s\d+(-\d+)?", run.name)
    return printable(f"{config.recipe}, from {dated[1] if dated else path.name}")


def setting_columns(readers: Sequence[RunReader]) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Returns the settings in which the runs of an experiment differ, as columns, and each run's values, both by setting.

    A setting that some runs lack, such as `refine.reward` for SFT, is compared between those that have it. A column has
    its `name`, its `label`, and `by_method`: whether the runs of one method agree in it, so that the method already
    names the difference.
    """
    flat = {reader.path.name: flat_settings(reader.config) for reader in readers if reader.config is not None}
    groups: dict[bool, dict[Any, list[Mapping[str, str]]]] = {True: {}, False: {}}
    for reader in readers:
        if reader.config is not None:
            experiment = experiment_of(reader)
            for key in (experiment, (experiment, reader.method)):
                groups[key == experiment].setdefault(key, []).append(flat[reader.path.name])
    varied, alike = (_varying(groups[whole].values()) for whole in (True, False))
    names = [name for name in varied if name not in SEEDS and name != "recipe"]
    labels = [setting_label(name) for name in names]
    columns = [
        {"name": name, "label": label if labels.count(label) == 1 else name, "by_method": name not in alike}
        for name, label in zip(names, labels, strict=True)
    ]
    columns = sorted(columns, key=lambda column: (column["by_method"], column["name"] in BOOKKEEPING))[:MOST_SETTINGS]
    kept = [column["name"] for column in columns]
    values = {
        run: {name: printable(setting_text(settings[name])) for name in kept if name in settings}
        for run, settings in flat.items()
    }
    return columns, values


def _varying(groups: Iterable[Sequence[Mapping[str, str]]]) -> dict[str, None]:
    """Returns the settings that have several values within a group; a group of settings, such as `refine`, is none itself."""
    found: dict[str, None] = {}
    for group in groups:
        values: dict[str, set[str]] = {}
        for settings in group:
            for name, value in settings.items():
                values.setdefault(name, set()).add(value)
        parents = {name.rpartition(".")[0] for name in values}
        found |= {name: None for name, several in values.items() if len(several) > 1 and name not in parents}
    return found


def rows_of(readers: Sequence[RunReader]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns a row per run, in the given order, and the columns of settings (`setting_columns`)."""
    columns, values = setting_columns(readers)
    styles = method_styles(dict.fromkeys(looks_like(reader.method) for reader in readers))
    return [_row(reader, values.get(reader.path.name, {}), styles) for reader in readers], columns


def _row(reader: RunReader, settings: Mapping[str, str], styles: Mapping[str, Any]) -> dict[str, Any]:
    progress, style = reader.progress, styles[looks_like(reader.method)]
    state, error, remark = shown_state(progress["state"], progress["error"])
    return {
        "name": reader.path.name,
        "experiment": experiment_of(reader),
        "method": method_styles([reader.method])[reader.method].label if reader.config is not None else "–",
        "about": method_sentence(reader.method) if reader.config is not None else "",
        "look": COLOURS.index(style.colour),
        "symbol": style.symbol,
        "seed": reader.seed,
        "state": state,
        "bad": state in BAD,
        "saved": getattr(reader.config, "kind", "") == "train" and len(checkpoints(reader.path)) > 0,
        "step": progress.get("step", 0),
        "steps": progress.get("steps", 0),
        "speed": progress.get("tokens_per_second"),
        "left": progress.get("seconds_left"),
        "error": error,
        "remark": " · ".join(filter(None, (remark, progress.get("note")))),
        "metrics": last_metrics(reader),
        "settings": dict(settings),
    }
