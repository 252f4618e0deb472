"""Follows run directories and gathers what the runs write for the live curves, without drawing."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from refine_lab.config import Config
from refine_lab.experiments.run_groups import group_names
from refine_lab.experiments.stored_scores import answer_files, recall_by_step
from refine_lab.runs.run import MetricsTail, Run
from refine_lab.text import printable, shorten
from refine_lab.training.gradient_noise import noise_warning
from widgets.figures.series import COLOURS, KNOWN_METHODS, PANELS, Plot, decimate, has_panel, looks_like, method_styles

INTERVAL = 0.25
"Minimum number of seconds between two updates."

LONGEST_INTERVAL = 4.0
"Maximum number of seconds between two updates while no run is in progress and nothing changes."

ENDED = ("finished", "stopped", "failed", "killed", "unreadable")

Activity = Literal["active", "idle", "ended"]
"""What an update found: data or a run in progress; nothing new and only runs that have not started; ended runs alone."""


class RunReader:
    """Reads one run directory as it grows; the directory need not exist yet."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.method, self.group, self.seed = "run", "run", 0
        self.config: Config | None = None
        self.frames: dict[str, pd.DataFrame] = dict.fromkeys(("train", "eval", "answers", "recall"), pd.DataFrame())
        self.asked: frozenset[str] = frozenset()  # digests of the documents of recall
        self._stored: list[tuple[str, int]] = []
        name = self.path.name
        self.progress: dict[str, Any] = {"name": name, "label": name, "state": "waiting", "error": "", "note": ""}
        self._run: Run | None = None
        self._lines: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}

    @property
    def ended(self) -> bool:
        return self.progress["state"] in ENDED

    def poll(self) -> bool:
        """Reads new data and returns whether there was any. Read errors are reported in `progress`, never raised."""
        before = self.progress
        try:
            run = self._open()
            status = self._status(run)  # before the metrics: the status `finished` is written after the last line
            grown = self._read_answers(run) if run.kind == "answer" else self._read_metrics()
            grown = self._read_recall(run) or grown
            self.progress = before | self._newer(status) | {"note": noise_warning(self.frames["eval"])}
        except FileNotFoundError:
            if self._run is None or self.path.is_dir():
                return False  # the directory does not exist yet, or is incomplete
            self.progress, grown = before | {"state": "unreadable", "error": "the run directory is gone"}, False
        except Exception as error:  # whatever the files of one run hold, the others are followed
            self.progress, grown = before | {"state": "unreadable", "error": printable(shorten(str(error)))}, False
        return grown or self.progress != before

    def _open(self) -> Run:
        if self._run is None:
            run = Run(self.path)
            self.config, self._tail = run.config, MetricsTail(run)
            self.method = self.group = run.config.method
            self.seed = run.config.seed
            self._run = run
        return self._run

    @staticmethod
    def _status(run: Run) -> dict[str, Any]:
        state, status = run.state, run.status
        return {
            "state": state, "step": max(status.step, run.done), "steps": status.steps, "error": status.error or "",
            "tokens_per_second": status.tokens_per_second, "seconds_left": status.seconds_left if state == "running" else None,
        }  # fmt: skip

    def _read_metrics(self) -> bool:
        restarts, new = self._tail.restarts, self._tail.read()
        restarted = self._tail.restarts != restarts
        for kind, lines in self._lines.items():
            lines[:] = [*([] if restarted else lines), *(line for line in new if line["kind"] == kind)]
            if lines and new:  # of repeated evaluations, the last is kept
                self.frames[kind] = pd.DataFrame(lines).drop_duplicates("step", keep="last")
            elif restarted:
                self.frames[kind] = pd.DataFrame()
        return bool(new) or restarted

    def _read_answers(self, run: Run) -> bool:
        """Updates the means over the prompts answered so far, after each prompt."""
        known = len(self.frames["answers"])
        if run.log.rows <= known:
            return False
        answers = run.answers()
        columns = [panel.key for panel in PANELS if panel.kind == "answers" and panel.key in answers]
        means = answers[columns].astype(float).expanding().mean()
        self.frames["answers"] = means.assign(step=np.arange(1, len(answers) + 1))
        return len(answers) != known

    def _read_recall(self, run: Run) -> bool:
        """Reads the recall that was stored after training, if there is any that has not been read."""
        if (stored := answer_files(run)) == self._stored:
            return False
        self._stored = stored
        self.frames["recall"], self.asked = recall_by_step(run)
        return True

    def _newer(self, status: dict[str, Any]) -> dict[str, Any]:
        """Updates a status with the last metrics line, since the status is written less often."""
        if self.frames["train"].empty:
            return status
        last = self.frames["train"].iloc[-1]
        speed = last.get("tokens_per_second", math.nan)
        if status["tokens_per_second"] is None and math.isfinite(speed):
            status["tokens_per_second"] = float(speed)
        return status | {"step": max(status["step"], int(last["step"]))}


def activity_of(readers: Sequence[RunReader], changed: bool) -> Activity:
    """Returns what an update of these readers found; `changed`: whether there was new data."""
    if all(reader.ended for reader in readers):
        return "ended"
    waiting = all(reader.ended or reader.progress["state"] == "waiting" for reader in readers)
    return "idle" if waiting and not changed else "active"


def name_methods(readers: Sequence[RunReader]) -> bool:
    """Sets each reader's method, under which its run is averaged, and its label; returns whether any changed.

    Runs with different settings count as different methods (see `run_groups.group_names`), so names depend on the other runs.
    """
    before = [reader.progress for reader in readers]
    known = {reader: reader.config for reader in readers if reader.config is not None}
    named = group_names([(reader.method, config, reader.path.name) for reader, config in known.items()])
    for reader, method in zip(known, named, strict=True):
        label = f"{method_styles(named)[method].label}, seed {reader.seed}"
        reader.group, reader.progress = method, reader.progress | {"method": method, "label": label}
    return before != [reader.progress for reader in readers]


def gather(readers: Sequence[RunReader], limit: int = 1000) -> dict[str, Any]:
    """Returns the data that the widget draws: methods with their symbols, and panels with a line per run, as float32 bytes.

    Lines have at most `limit` points, thinned by `decimate`; lines of one method use the same steps, as far as their runs
    have progressed, so that means are taken at equal steps. A line with a spread also has `low` and `high`; one of training
    or evaluation has the `tokens` and `seconds` up to each step.
    """
    styles = method_styles(reader.group for reader in readers)
    order = [*dict.fromkeys([*KNOWN_METHODS, *map(looks_like, styles)])]
    ordered = sorted(styles.items(), key=lambda item: order.index(looks_like(item[0])))
    methods = [
        {"method": method, "label": style.label, "symbol": style.symbol, "dash": style.dash, "width": style.width}
        | {"look": COLOURS.index(style.colour)}
        for method, style in ordered
    ]
    panels = []
    for panel in PANELS:
        drawn = [reader for reader in readers if has_panel(reader.frames[panel.kind], panel)]
        if panel.kind == "recall":  # runs that were asked other documents cannot be compared
            drawn = [reader for reader in drawn if reader.asked == drawn[0].asked]
        steps = _kept_steps(drawn, panel, limit)
        lines = [
            {"method": reader.group, "seed": reader.seed, "run": reader.path.name}
            | _line(reader, panel, steps[reader.group])
            for reader in drawn
        ]
        facts = {
            "name": panel.name,
            "title": panel.title,
            "unit": panel.unit,
            "marks": panel.kind in ("eval", "recall"),
        }
        if lines:
            panels.append(facts | {"of": "prompt" if panel.kind == "answers" else "step", "lines": lines})
    return {"methods": methods, "panels": panels}


def _kept_steps(readers: Sequence[RunReader], panel: Plot, limit: int) -> dict[str, set[float]]:
    """Returns, by method, the steps to draw: those that `decimate` keeps for any of its runs."""
    runs = Counter(reader.group for reader in readers)
    steps: dict[str, set[float]] = {method: set() for method in runs}
    for reader in readers:
        rows = reader.frames[panel.kind].dropna(subset="step")
        kept = decimate(rows[panel.key].to_numpy(dtype=float), max(4, limit // runs[reader.group]))
        steps[reader.group] |= {*rows["step"].iloc[kept]}
    return steps


def _line(reader: RunReader, panel: Plot, steps: Collection[float]) -> dict[str, Any]:
    frame = reader.frames[panel.kind]
    rows = frame[frame["step"].isin(steps)]
    y = rows[panel.key].to_numpy(dtype=float) * panel.scale
    columns = {"x": rows["step"].to_numpy(dtype=float), "y": y}
    if panel.spread is not None and panel.spread in rows:
        width = rows[panel.spread].to_numpy(dtype=float) * panel.scale
        columns |= {"low": y - width, "high": y + width}
    if panel.kind != "answers":
        columns |= _costs(reader.frames["train"], columns["x"])
    return {name: values.astype("<f4").tobytes() for name, values in columns.items()}


def _costs(train: pd.DataFrame, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tokens trained on and the seconds of training up to each of some steps, if a run records them.

    The seconds are those of the updates, without evaluations and pauses. Before the first update both are 0.
    """
    if not {"step", "tokens", "seconds"} <= {*train} or train[["tokens", "seconds"]].isna().to_numpy().any():
        return {}
    done = np.searchsorted(train["step"].to_numpy(dtype=float), steps, side="right")
    sums = {"tokens": train["tokens"].to_numpy(dtype=float), "seconds": train["seconds"].to_numpy(dtype=float).cumsum()}
    return {name: np.concatenate([[0.0], values])[done] for name, values in sums.items()}


class Follower(threading.Thread):
    """A thread that calls `update` at most four times a second, and spends at most a fifth of the time on it.

    While `update` returns "idle", the time between two calls doubles up to `LONGEST_INTERVAL`. The thread ends when it
    returns "ended". An error in `update` is passed to `on_error` and also ends the thread.
    """

    def __init__(self, update: Callable[[], Activity], on_error: Callable[[str], object]) -> None:
        super().__init__(name="live-curves", daemon=True)
        self._update, self._on_error = update, on_error
        self._woken, self._stopping = threading.Event(), False

    def run(self) -> None:
        try:
            interval = wait = INTERVAL
            while not self._stopping:
                if self._woken.wait(wait):
                    self._woken.clear()
                    interval = INTERVAL
                if self._stopping:
                    return
                begin = time.monotonic()
                found = self._update()
                if found == "ended":
                    return
                interval = min(2 * interval, LONGEST_INTERVAL) if found == "idle" else INTERVAL
                wait = max(interval, 4 * (time.monotonic() - begin))
        except Exception as error:  # an exception that propagates from a thread is never displayed
            self._on_error(f"{type(error).__name__}: {error}")

    def wake(self) -> None:
        """Updates now, and then as often as at first."""
        self._woken.set()

    def stop(self) -> None:
        self._stopping = True
        self._woken.set()
        if self.is_alive() and self is not threading.current_thread():
            self.join(timeout=5)


class Following:
    """The part of a widget that follows run directories in a thread, in which it calls `_update`."""

    _follower: Follower | None = None

    def _update(self) -> Activity:
        """Reads and shows new data, and returns whether there was any."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts following, also after `stop` or when an ended run is resumed."""
        widget: Any = self
        if self._follower is None or not self._follower.is_alive():
            self._follower = Follower(self._update, lambda text: widget.set_trait("error", text))
            self._follower.start()
        else:
            self._follower.wake()

    def stop(self) -> None:
        """Reads once more and stops following; what is shown remains."""
        self._stop_follower()
        self._update()

    def close(self) -> None:
        self._stop_follower()
        base: Any = super()
        base.close()

    def _stop_follower(self) -> None:
        if self._follower is not None:
            self._follower.stop()
            self._follower = None
