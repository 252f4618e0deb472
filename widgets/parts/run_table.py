"""The run table: one row per run with its state, progress, last metrics and the settings in which the runs differ."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import traitlets

from refine_lab.runs.run import Run
from refine_lab.text import printable
from widgets.core.base import Widget
from widgets.core.glossary import explain
from widgets.parts.follower import Activity, Following, RunReader, activity_of
from widgets.parts.run_rows import metric_headings, rows_of


class RunTable(Following, Widget):
    """A table of runs, grouped by experiment, that can be sorted by any column and filtered by text.

    Runs are selected in it, and the curve of a selected run can be hidden. A thread follows the run directories until
    all runs have ended. The rows, the order and the filter are part of the widget's state, so that reloading the page
    displays them again.
    """

    rows = traitlets.List().tag(sync=True)
    "A row per run, as returned by `run_rows.rows_of`."
    settings = traitlets.List().tag(sync=True)
    "Columns of settings, as returned by `run_rows.setting_columns`."
    metrics = traitlets.List(traitlets.Unicode()).tag(sync=True)
    "Headings of the metrics, in order."
    helps = traitlets.List(traitlets.Unicode()).tag(sync=True)
    "The glossary's sentences about the metrics, empty where it has none."
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
    "Names of the selected runs, in the order of the rows; unlisted names are dropped."
    hidden = traitlets.List(traitlets.Unicode()).tag(sync=True)
    "Names of the runs whose curves are hidden."
    sort = traitlets.List(["", False]).tag(sync=True)
    "Key of the column that orders the rows within each group, and whether it descends; an empty key: newest first."
    filter = traitlets.Unicode().tag(sync=True)
    "Words that a row must contain to be shown."
    grouped = traitlets.Bool(True).tag(sync=True)
    "Whether the rows are grouped by experiment."
    every_setting = traitlets.Bool(False).tag(sync=True)
    "Whether settings in which only runs of different methods differ are columns too."
    selectable = traitlets.Bool(True).tag(sync=True)
    "Whether runs can be selected; on a page without Python they cannot."
    opens_memory = traitlets.Bool(False).tag(sync=True)
    "Whether each row has a button that sets `opened`."
    opened = traitlets.Unicode().tag(sync=True)
    "Name of the run whose memory is shown; empty: none."

    def __init__(self, runs: Sequence[Run | Path] = (), **traits: Any) -> None:
        super().__init__(**traits)
        self._readers: list[RunReader] = []
        self._lock = threading.RLock()
        self.show(runs)

    def show(self, runs: Sequence[Run | Path]) -> None:
        """Shows these runs, in this order, and follows those that have not ended; a selection among them is kept."""
        paths = [run.path if isinstance(run, Run) else Path(run).absolute() for run in runs]
        with self._lock:
            known = {reader.path: reader for reader in self._readers}
            self._readers = [known.get(path) or RunReader(path) for path in dict.fromkeys(paths)]
        if self._update(always=True) != "ended":
            self.start()

    def copy_of(self, names: Sequence[str]) -> RunTable:
        """Returns a table of these runs alone for a page without Python, where nothing can be selected."""
        rows = [row for row in self.rows if row["name"] in names]
        copy = RunTable(selectable=False)
        copy.rows, copy.settings, copy.sort, copy.grouped = rows, self.settings, self.sort, self.grouped
        copy.metrics, copy.helps = self.metrics, self.helps
        copy.selected, copy.hidden = [row["name"] for row in rows], self.hidden
        return copy

    def __repr__(self) -> str:
        """Lists the runs by experiment, with the columns that have values."""
        if not self.rows:
            return "RunTable: no runs"
        columns = [column for column in self.settings if self.every_setting or not column["by_method"]]
        table = pd.DataFrame([self._line(row, columns) for row in self.rows]).fillna("–")
        empty = [name for name in self.metrics if name in table and table[name].eq("–").all()]
        lines = []
        for experiment, part in table.drop(columns=empty).groupby("experiment", sort=False):
            lines += [str(experiment), part.drop(columns="experiment").to_string(index=False)]
        return printable("\n".join(lines))

    def _line(self, row: dict[str, Any], columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
        about = row["error"] or row["remark"]
        return {
            "experiment": row["experiment"],
            "": "*" if row["name"] in self.selected else "",
            "run": row["name"],
            "method": row["method"],
            "seed": row["seed"],
            "state": row["state"] + (f" ({about})" if about else ""),
            "step": f"{row['step']}/{row['steps'] or '?'}",
            **{name: f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "–" for name in self.metrics},
            **{column["label"]: row["settings"].get(column["name"], "–") for column in columns},
        }

    @traitlets.validate("selected", "hidden")
    def _check_names(self, proposal: Any) -> list[str]:
        wanted = {*proposal["value"]}
        return [row["name"] for row in self.rows if row["name"] in wanted]

    def _update(self, always: bool = False) -> Activity:
        """Reads and shows new data."""
        with self._lock:
            changed = [reader.poll() for reader in self._readers]  # all of them, so no generator in any()
            if any(changed) or always:
                rows, columns = rows_of(self._readers)
                with self.hold_sync():
                    self.rows, self.settings = rows, columns
                    self.metrics = metric_headings(self._readers)
                    self.helps = [*map(explain, self.metrics)]
                    self.selected, self.hidden = self.selected, self.hidden  # without runs that are gone
            return activity_of(self._readers, any(changed))
