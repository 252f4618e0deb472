"""Follows run directories and gathers what the runs write for the live curves, without drawing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from refine_lab.config import Config
from refine_lab.experiments.run_groups import group_names
from refine_lab.runs.run import MetricsTail, Run
from widgets.figures.series import KNOWN_METHODS, PANELS, Panel, decimate, has_panel, looks_like, method_styles

INTERVAL = 0.25
"Minimum number of seconds between two updates."

ENDED = ("finished", "stopped", "failed", "killed", "unreadable")


class RunReader:
    """Reads one run directory as it grows; the directory need not exist yet."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.method, self.group, self.seed = "run", "run", 0
        self.config: Config | None = None
        self.frames = {"train": pd.DataFrame(), "eval": pd.DataFrame()}
        name = self.path.name
        self.progress: dict[str, Any] = {"name": name, "label": name, "state": "waiting", "error": ""}
        self._seen = False
        self._run: Run | None = None
        self._tail: MetricsTail | None = None
        self._lines: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}

    @property
    def ended(self) -> bool:
        return self.progress["state"] in ENDED

    def poll(self) -> bool:
        """Reads new data and returns whether there was any. Read errors are reported in `progress`, never raised."""
        before = self.progress
        try:
            status = self._status()  # before the metrics: `finished` is said after the last line
            self._seen = True
            grown = self._read_metrics()
            self.progress = before | status
            self._fill_progress()
        except FileNotFoundError:
            if not self._seen or self.path.is_dir():
                return False  # not there yet, or not whole
            self.progress, grown = before | {"state": "unreadable", "error": "the run directory is gone"}, False
        except (OSError, ValueError) as error:
            self.progress, grown = before | {"state": "unreadable", "error": str(error)}, False
        return grown or self.progress != before

    def _status(self) -> dict[str, Any]:
        if self._run is None:
            self._run = Run(self.path)
            self._tail = MetricsTail(self._run)
            self.config = self._run.config
            self.method = self.group = self._run.config.method
            self.seed = self._run.config.seed
        state, status = self._run.state, self._run.status
        return {
            "state": state, "step": max(status.step, self._run.done), "steps": status.steps, "error": status.error or "",
            "tokens_per_second": status.tokens_per_second, "seconds_left": status.seconds_left if state == "running" else None,
        }  # fmt: skip

    def _read_metrics(self) -> bool:
        assert self._tail is not None and self._run is not None
        if self._run.kind == "answer":
            return self._read_answers(self._run)
        restarts, new = self._tail.restarts, self._tail.read()
        restarted = self._tail.restarts != restarts
        if restarted:
            self._lines = {"train": [], "eval": []}
        for line in new:
            if line.get("kind") in self._lines:
                self._lines[line["kind"]].append(line)
        if not new and not restarted:
            return False
        for kind, lines in self._lines.items():  # an evaluation made twice counts once
            self.frames[kind] = pd.DataFrame(lines).drop_duplicates("step", keep="last") if lines else pd.DataFrame()
        return True

    def _read_answers(self, run: Run) -> bool:
        """Updates the means over the prompts answered so far, after each prompt."""
        known = self.frames.get("answers", pd.DataFrame())
        if run.log.rows <= len(known):
            return False
        answers = run.answers()
        means = answers[
            [key for key in ("contains_answer", "exact_match", "loss_after", "entropy_after") if key in answers]
        ]
        self.frames["answers"] = means.astype(float).expanding().mean().assign(step=np.arange(1, len(answers) + 1))
        return len(answers) != len(known)

    def _fill_progress(self) -> None:
        """Takes newer values from the metrics lines, since the status is written less often."""
        steps, speeds = (self.frames["train"].get(name) for name in ("step", "tokens_per_second"))
        if steps is not None:
            self.progress["step"] = max(self.progress["step"], int(steps.iloc[-1]))
        if self.progress["tokens_per_second"] is None and speeds is not None and math.isfinite(speeds.iloc[-1]):
            self.progress["tokens_per_second"] = float(speeds.iloc[-1])


def name_arms(readers: Sequence[RunReader]) -> bool:
    """Sets each reader's method, under which its run is averaged, and its label; returns whether any changed.

    Runs with other settings are other methods (see `run_groups.group_names`), so names depend on the other runs.
    """
    before = [reader.progress for reader in readers]
    known = [reader for reader in readers if reader.config is not None]
    named = group_names(
        [(reader.method, reader.config, reader.path.name) for reader in known if reader.config is not None]
    )
    for reader, method in zip(known, named, strict=True):
        label = f"{method_styles(named)[method].label}, seed {reader.seed}"
        reader.group, reader.progress = method, reader.progress | {"method": method, "label": label}
    return before != [reader.progress for reader in readers]


def gather(readers: Sequence[RunReader], limit: int = 1000) -> dict[str, Any]:
    """Returns the data that the widget draws: methods with their symbols, and panels with a line per run, as float32 bytes.

    Lines have at most `limit` points, thinned by `decimate`; lines of one method use the same steps, as far as their runs
    have progressed, so that means are taken at equal steps. A line with a spread also has `low` and `high`.
    """
    styles = method_styles(reader.group for reader in readers)
    order = [*KNOWN_METHODS, *(looks_like(method) for method in styles if looks_like(method) not in KNOWN_METHODS)]
    looks = {method: order.index(looks_like(method)) for method in styles}
    methods = [
        {
            "method": method,
            "label": styles[method].label,
            "symbol": styles[method].symbol,
            "dash": styles[method].dash,
            "look": look,
        }
        for method, look in sorted(looks.items(), key=lambda each: each[1])
    ]
    panels = []
    for panel in PANELS:
        drawn = [reader for reader in readers if has_panel(reader.frames.get(panel.kind, pd.DataFrame()), panel)]
        steps = _kept_steps(drawn, panel, limit)
        lines = [
            {
                "method": reader.group,
                "seed": reader.seed,
                **_line(reader.frames[panel.kind], panel, steps[reader.group]),
            }
            for reader in drawn
        ]
        if lines:
            panels.append(
                {
                    "name": panel.name,
                    "title": panel.title,
                    "unit": panel.unit,
                    "marks": panel.kind == "eval",
                    "of": "prompt" if panel.kind == "answers" else "step",
                    "lines": lines,
                }
            )
    return {"methods": methods, "panels": panels}


def _kept_steps(readers: Sequence[RunReader], panel: Panel, limit: int) -> dict[str, np.ndarray]:
    """Returns, by method, the steps to draw: those that `decimate` keeps for any of its runs."""
    frames: dict[str, list[pd.DataFrame]] = {}
    for reader in readers:
        frame = reader.frames[panel.kind]
        frames.setdefault(reader.group, []).append(frame[frame["step"].notna()])
    return {
        method: np.concatenate(
            [
                rows["step"].to_numpy(dtype=float)[
                    decimate(rows[panel.key].to_numpy(dtype=float), max(4, limit // len(own)))
                ]
                for rows in own
            ]
        )
        for method, own in frames.items()
    }


def _line(frame: pd.DataFrame, panel: Panel, steps: np.ndarray) -> dict[str, bytes]:
    rows = frame[frame["step"].isin(steps)]
    y = rows[panel.key].to_numpy(dtype=float) * panel.scale
    columns = {"x": rows["step"].to_numpy(dtype=float), "y": y}
    if panel.spread is not None and panel.spread in rows:
        width = rows[panel.spread].to_numpy(dtype=float) * panel.scale
        columns |= {"low": y - width, "high": y + width}
    return {name: values.astype("<f4").tobytes() for name, values in columns.items()}


class Follower(threading.Thread):
    """A thread that calls `update` at most four times a second, and spends at most a fifth of the time on it.

    It ends when `update` returns False. An error in `update` is passed to `on_error` and also ends it.
    """

    def __init__(self, update: Callable[[], bool], on_error: Callable[[str], object]) -> None:
        super().__init__(name="live-curves", daemon=True)
        self._update, self._on_error = update, on_error
        self._stop_event = threading.Event()

    def run(self) -> None:
        try:
            wait = INTERVAL
            while not self._stop_event.wait(wait):
                begin = time.monotonic()
                if not self._update():
                    return
                wait = max(INTERVAL, 4 * (time.monotonic() - begin))
        except Exception as error:  # the thread's edge: raised further, nobody would ever see it
            self._on_error(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        self._stop_event.set()
        if self.is_alive() and self is not threading.current_thread():
            self.join(timeout=5)
