"""Live curves of training runs: Python follows the run directories and thins the series; JavaScript draws them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import traitlets

from refine_lab.runs.run import Run
from refine_lab.text import printable
from widgets.core.base import Widget
from widgets.core.glossary import explain
from widgets.core.packing import PACKED
from widgets.figures.plots import training_curves
from widgets.parts.follower import Activity, Following, RunReader, activity_of, gather, name_methods
from widgets.parts.run_rows import last_metrics, metric_headings, shown_state

Followed = Path | str | Run
AXES = ("step", "tokens", "seconds")
"Quantities of the x axis."


class Curves(Widget):
    """Panels of curves over steps, and progress lines, set by the caller."""

    page_heading = "Curves"

    curves = traitlets.Dict().tag(**PACKED)
    "Methods and panels, as returned by `follower.gather`."
    progress = traitlets.List().tag(sync=True)
    "State, step, speed, remaining time and error of each run; `shown`, `failure` and `remark` as from `shown_state`."
    hidden = traitlets.List(traitlets.Unicode()).tag(sync=True)
    "Names of runs whose curves are not drawn; they stay in `curves`."
    listed = traitlets.Bool(True).tag(sync=True)
    "Whether the progress lines are above the curves; the run monitor lists the runs in a table instead."
    axis = traitlets.Enum([*AXES], "step").tag(sync=True)
    "The x axis: steps, tokens, or seconds of training; panels that lack tokens and seconds keep their steps."

    @traitlets.validate("curves")
    def _with_helps(self, proposal: Any) -> dict[str, Any]:
        """Adds the glossary's sentence about each panel's title."""
        curves = proposal["value"]
        panels = [{"help": explain(panel["title"]), **panel} for panel in curves.get("panels", [])]
        return {**curves, "panels": panels} if panels else curves


class LiveCurves(Following, Curves):
    """Curves and progress of runs, finished or still training.

    `runs`: run directories (paths or `Run`), which need not exist yet; more can be added later. The curves are part of
    the widget's state, so that reloading the page displays them again. A thread follows the directories until all runs
    have ended.
    """

    def __init__(self, runs: Followed | Iterable[Followed] = ()) -> None:
        super().__init__()
        self._readers: list[RunReader] = []
        self._lock = threading.RLock()
        self.add(*([runs] if isinstance(runs, (str, Path, Run)) else runs))

    def add(self, *runs: Followed) -> None:
        """Follows further runs; runs that are already followed are not added twice."""
        paths = [_path(run) for run in runs]
        with self._lock:
            known = {reader.path for reader in self._readers}
            self._readers += [RunReader(path) for path in dict.fromkeys(paths) if path not in known]
        if self._update() != "ended":
            self.start()

    def show(self, *runs: Followed) -> None:
        """Follows only these runs."""
        paths = {_path(run) for run in runs}
        with self._lock:
            self._readers = [reader for reader in self._readers if reader.path in paths]
            self.progress = []  # so that the remaining runs are drawn again
        self.add(*runs)

    def _update(self) -> Activity:
        """Reads and displays new data."""
        with self._lock:
            changed = [reader.poll() for reader in self._readers]  # all of them, so no generator in any()
            changed.append(name_methods(self._readers))
            if any(changed) or len(self.progress) != len(self._readers):
                self.curves = gather(self._readers)
                self.progress = [_shown(reader.progress) for reader in self._readers]
            return activity_of(self._readers, any(changed))

    def frame(self, kind: str = "train") -> pd.DataFrame:
        """Returns the lines read so far, `train` or `eval`, with `seed` and the `method` under which a run is averaged."""
        with self._lock:
            frames = [r.frames[kind].assign(method=r.group, seed=r.seed) for r in self._readers if len(r.frames[kind])]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def figure(self) -> go.Figure:
        """Returns the same curves as a static plotly figure, for executed notebooks that are only read."""
        return training_curves(self.frame("train"), self.frame("eval"))

    def __repr__(self) -> str:
        """Lists the runs in a table."""
        readers = getattr(self, "_readers", [])
        headings = metric_headings(readers)
        table = pd.DataFrame([self._row(reader, headings) for reader in readers])
        empty = [name for name in table.columns[3:] if table[name].eq("–").all()]
        return "LiveCurves: no runs" if table.empty else printable(table.drop(columns=empty).to_string(index=False))

    @staticmethod
    def _row(reader: RunReader, headings: Sequence[str]) -> dict[str, Any]:
        progress = reader.progress
        state, failure, remark = shown_state(progress["state"], progress["error"])
        speed, metrics = progress.get("tokens_per_second"), last_metrics(reader)
        row = {
            "run": progress["label"],
            "state": state + (f" ({failure or remark})" if failure or remark else ""),
            "step": f"{progress.get('step', 0)}/{progress.get('steps', '?')}",
            "tokens/s": f"{speed:,.0f}" if speed else "–",
        }
        row |= {name: f"{metrics[name]:.4f}" if name in metrics else "–" for name in headings}
        return row | {"note": progress.get("note") or "–"}


def _shown(progress: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's progress with its state as the page names it."""
    state, failure, remark = shown_state(progress["state"], progress["error"])
    return progress | {"shown": state, "failure": failure, "remark": remark}


def _path(run: Followed) -> Path:
    return run.path if isinstance(run, Run) else Path(run).absolute()
