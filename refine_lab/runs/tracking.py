"""Copies the metrics of a run to an experiment tracker, trackio or Weights & Biases; the run's records do not change.

Every step becomes one entry. A step is sent once all of its lines have been written, so that a run in progress can be
followed, and a later call sends only the steps that the tracker does not have yet.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from refine_lab.runs.durable import short_digest
from refine_lab.runs.files import read_json, run_file
from refine_lab.validation import ConfigError, require, unknown

TRACKERS = ("trackio", "wandb")
GROUPS = {"train": "train", "eval": "held_out", "update": "update"}
"""The part of a metric's name before the slash, by the kind of its line in `metrics.jsonl`."""
LEFT_OUT = ("kind", "step", "time")


def copy_metrics(run: Any, tail: Any, tracker: str, project: str, every: float = 5.0) -> int:
    """Sends the metrics of a run, and those that it still writes until it ends; returns the number of entries sent.

    `tail` is the run's `MetricsTail`, which is read every few seconds. See `Run.log_to`.
    """
    tracked, finish, next_step = _opened(run, tracker, project)
    entries, restarts, sent = Entries(), 0, 0
    try:
        while True:
            alive = run.alive  # asked first: what the run writes before it ends is then read below
            lines = tail.read()
            if tail.restarts != restarts:  # the run was resumed, and all of its lines are read again
                entries, restarts = Entries(), tail.restarts
            for step, values in entries.complete(lines, ended=not alive):
                if step >= next_step:
                    tracked.log(values, step=step)
                    next_step, sent = step + 1, sent + 1
            if not alive:
                return sent
            time.sleep(every)
    finally:
        finish()


class Entries:
    """Joins the lines of one step; each update of test-time training is an entry of its own, numbered from 1."""

    def __init__(self) -> None:
        self._open: dict[int, dict[str, float]] = {}
        self._updates = 0

    def complete(self, lines: Sequence[Mapping[str, Any]], *, ended: bool) -> Iterator[tuple[int, dict[str, float]]]:
        """Yields step and values of the entries that no later line adds to: all but the last one, unless the run has ended."""
        for line in lines:
            step = int(line["step"])
            if line["kind"] == "update":
                self._updates += 1
                step = self._updates
            self._open.setdefault(step, {}).update(_values(line))
        last = max(self._open, default=0)
        for step in sorted(step for step in self._open if ended or step < last):
            yield step, self._open.pop(step)


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a line, as `train/ntp_loss`; the batch of an update is one of them."""
    group = GROUPS.get(line["kind"], line["kind"])
    numbers = {name: value for name, value in line.items() if name not in LEFT_OUT and isinstance(value, (int, float))}
    if line["kind"] == "update":
        numbers["batch"] = line["step"]
    return {f"{group}/{name}": float(value) for name, value in numbers.items() if math.isfinite(value)}


def _opened(run: Any, tracker: str, project: str) -> tuple[Any, Callable[[], object], int]:
    """Opens the run in the tracker, new or not; returns it, how it is closed, and the first step that it does not have."""
    if tracker not in TRACKERS:
        raise unknown("tracker", tracker, TRACKERS)
    require(bool(project.strip()), "project", project, "the name of a project")
    if find_spec(tracker) is None:
        sentence = f"{tracker} is not installed: pip install {tracker} (or the extra `tracking` of refine_lab)"
        raise ConfigError("tracker", tracker, "installed", sentence)
    package: Any = import_module(tracker)
    path = run_file(run.path, "config.json")
    name = (
        f"{run.name}-{short_digest(hashlib.sha256(path.read_bytes()))[:8]}"  # runs of other folders can have this name
    )
    facts = {"project": project, "name": name, "config": read_json(path), "resume": "allow"}
    if tracker == "trackio":
        quiet = {
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
        }  # those would be this process's, not the run's
        opened = package.init(**facts, **quiet)
        return opened, package.finish, opened._next_step
    settings = package.Settings(console="off", x_disable_stats=True)
    opened = package.init(**facts, id=name, reinit="create_new", settings=settings)
    return opened, opened.finish, opened.step
