"""Records what a run started with in `started.json`, and compares its current configuration and functions with it.

The file is written when the run is created. It contains the configuration, the sources of a custom reward and of a custom
selection, the run's number in its folder, the run that it was forked from, and every later change that was accepted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from refine_lab.config import TrainConfig, from_json, to_json
from refine_lab.runs.checkpoints import newest_whole
from refine_lab.runs.checks import HIGHEST
from refine_lab.runs.files import read_json, write_json
from refine_lab.runs.run import CONFIGS, STARTED, Run, located, portable
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import ConfigError

FUNCTIONS = {"reward": "reward.py", "selection": "selection.py"}
"""Custom functions of a run -> the file of each one's source; the names are also those of the fields of `started.json`."""

Sources = Mapping[str, str | None]
"""Custom function (a name in `FUNCTIONS`) -> its source, or None."""

INPUTS = ("texts", "prompts", "begins_with")
"""Names of inputs that can be overridden, besides the fields of a configuration (see `refine_lab.training.inputs`)."""

FREE = frozenset(
    {
        *("gradient_noise", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every"),
        *("processes", "sharding"),
    }
)
"""Fields that do not affect any result (`processes` and `sharding`: up to rounding), so they may be changed at any time."""

SHOWN = 200
"""Maximum number of characters of a value in a message."""


@dataclass(frozen=True)
class Change:
    """A setting or an input that differs from what a run started with; `name` is what `--override` accepts."""

    name: str
    before: Any
    now: Any
    sentence: str = ""

    def __str__(self) -> str:
        return self.sentence or f"{self.name} was {short(self.before)} and is now {short(self.now)}"


def write_started(
    path: Path, config: TrainConfig | TTTRunConfig, sources: Sources, parent: Mapping[str, Any] | None
) -> None:
    """Writes the file of a new run; its number is one more than the highest in its folder, regardless of the clock."""
    numbers = [_number(other) for other in path.parent.glob(f"*/{STARTED}")]
    values = {"number": max(numbers, default=0) + 1, "time": time.time(), "parent": parent, "changes": []}
    _write(path, config, sources, values)


def changes_of(run: Run) -> list[Change]:
    """Returns the differences of a run's configuration and custom functions from those that it started with."""
    if not (run.path / STARTED).is_file():
        return []
    started, kind = run.started, CONFIGS[run.kind]
    try:
        before = located(from_json(json.dumps(started["config"]), f"config of {run.path / STARTED}", kind), run.path)
        sources = {"selection": None, **{name: started[name] for name in FUNCTIONS if name in {"reward", *started}}}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{run.path / STARTED} cannot be used: {error}") from None
    found = [change for change in _differences(before, run.config) if change.name not in FREE]
    sources_now = sources_of(run.path)
    return found + [
        _source_change(file, sources[name], sources_now[name])
        for name, file in FUNCTIONS.items()
        if sources[name] != sources_now[name]
    ]


def _source_change(file: str, before: str | None, now: str | None) -> Change:
    lines = zip_longest((before or "").splitlines(), (now or "").splitlines())
    number, (old, new) = next((pair for pair in enumerate(lines, start=1) if pair[1][0] != pair[1][1]), (0, ("", "")))
    return Change(file, before, now, f"{file} has changed: line {number} was {short(old)} and is now {short(new)}")


def check_unchanged(run: Run, overrides: Collection[str] = ()) -> list[Change]:
    """Returns a run's accepted changes: those in `overrides`, and more steps at a constant learning rate.

    Raises ValueError, naming each with both values, for any other change, and ConfigError for an unknown name in
    `overrides`.
    """
    others = (*INPUTS, *FUNCTIONS.values())
    allowed = {*_names(run.config), *others}
    for name in overrides:
        if name not in allowed:
            raise ConfigError("--override", name, "a field of the run's configuration, or " + ", ".join(others))
    found = changes_of(run)
    if refused := [change for change in found if change.name not in overrides and not _extends(run, change)]:
        raise ValueError(refusal(run, "settings", refused))
    return found


def check_beginning(run: Run) -> None:
    """Raises ValueError if a run with no undamaged checkpoint would start over: a fork, or a run with a changed setting."""
    started = run.started
    changed = [change["name"] for change in started.get("changes", []) if change["step"]]
    if not (started.get("parent") or changed):
        return
    found, damaged = newest_whole(run.path)
    if found is None:
        sentence = f" ({damaged[0][1]})" if damaged else ""
        what = "a fork" if started.get("parent") else f"a run whose {changed[0]} was changed"
        raise ValueError(
            f"{run.path} has no undamaged checkpoint{sentence}, and {what} cannot start over: restore a checkpoint, or "
            "create a new run"
        )


def refusal(run: Run, what: str, changes: Sequence[Change]) -> str:
    """Returns the error message for resuming a run with different settings or inputs."""
    named = "; ".join(map(str, changes[:5])) + (f" (and {len(changes) - 5} more)" if len(changes) > 5 else "")
    flags = " ".join(f"--override {name}" for name in dict.fromkeys(change.name for change in changes))
    return (
        f"{run.path} was started with different {what}: {named}. Restore them, start a new run, or accept the change with "
        f"`python -m refine_lab.training RUN {flags}`"
    )


def accept(run: Run, changes: Sequence[Change]) -> None:
    """Records accepted changes, which later resumptions are compared with; the caller must hold the run's lock.

    A run of an earlier version, which has no record, is compared from now on.
    """
    recorded = (run.path / STARTED).is_file()
    if recorded and not changes:
        return
    if not recorded and run.done:
        print(
            f"{run.path} has no {STARTED}, so it is not known whether its settings have changed since it started",
            flush=True,
        )
    values = run.started if recorded else {"number": 0, "time": None, "parent": None, "changes": []}
    new = [{"name": each.name, "before": each.before, "now": each.now, "step": run.done} for each in changes]
    _write(run.path, run.config, sources_of(run.path), {**values, "changes": [*values["changes"], *new]})


def continues_after(run: Run, step: int) -> None:
    """Lowers the steps recorded for accepted changes to `step`, after which the run continues.

    A change is recorded with the step of the last checkpoint, but the run continues from an earlier one if that
    checkpoint is damaged. The caller must hold the run's lock.
    """
    started = run.started
    changes = started.get("changes", [])
    if any(change["step"] > step for change in changes):
        lowered = [{**change, "step": min(change["step"], step)} for change in changes]
        write_json(run.path / STARTED, {**started, "changes": lowered})


def _extends(run: Run, change: Change) -> bool:
    """Returns whether a change only adds steps that leave the earlier ones as they were."""
    return change.name == "steps" and change.now > change.before and run.config.schedule == "constant"


def _write(path: Path, config: Any, sources: Sources, values: Mapping[str, Any]) -> None:
    stored = json.loads(to_json(portable(config, path)))
    write_json(path / STARTED, {**values, **{name: sources.get(name) for name in FUNCTIONS}, "config": stored})


def sources_of(path: Path) -> dict[str, str | None]:
    """Returns the source of each of a run's custom functions, or None for those that it does not have.

    Raises ValueError, naming the file, if one is not text.
    """
    return {name: _text(path / file) for name, file in FUNCTIONS.items()}


def _text(source: Path) -> str | None:
    try:
        return source.read_text(encoding="utf-8") if source.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from None


def _number(started: Path) -> int:
    try:
        number = read_json(started).get("number")
    except (OSError, ValueError):
        return 0  # the damage is reported where the runs are listed
    return number if type(number) is int and 0 <= number < HIGHEST else 0


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[Change]:
    for field in fields(now):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if is_dataclass(old) and is_dataclass(new):
            yield from _differences(old, new, f"{prefix}{field.name}.")
        elif old != new:
            yield Change(prefix + field.name, _plain(old), _plain(new))


def _names(config: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(config):
        yield prefix + field.name
        if is_dataclass(value := getattr(config, field.name)):
            yield from _names(value, f"{prefix}{field.name}.")


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def short(value: Any) -> str:
    """Returns a value as text of at most about `SHOWN` characters."""
    text = "none" if value is None else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
