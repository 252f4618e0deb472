"""The table of a sweep: on screen row by row, and as `sweep.json` and `sweep.txt` in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from refine_lab.runs.durable import replace_text
from refine_lab.runs.files import write_json
from refine_lab.sweep.cells import Cell
from refine_lab.sweep.grid import varying
from refine_lab.text import printable

FIRST = ("ntp_loss", "answer_loss", "contains_answer")
"""Candidate metrics: the text table shows the first that a run has; `sweep.json` contains all."""


def cell_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Returns one row per cell: the parameters that vary, `state`, `seconds`, one measure per run, `error`, `folder`."""
    names = varying([cell.values for cell in cells])
    return pd.DataFrame([cell_row(cell, names) for cell in cells])


def cell_row(cell: Cell, names: Sequence[str]) -> dict[str, Any]:
    """Returns the row of one cell, with the parameters in `names`."""
    values = {name: _value(cell.values[name]) for name in names}
    facts = {"state": cell.state, "seconds": cell.seconds}
    return values | facts | {"measures": _first(cell.measures), "error": cell.error, "folder": cell.name}


def write_tables(out: Path, notebook: str, cells: Sequence[Cell]) -> None:
    """Writes `sweep.json` and `sweep.txt`, with every cell and its state."""
    rows = [
        {
            "folder": cell.name,
            "values": dict(cell.values),
            "state": cell.state,
            "seconds": cell.seconds,
            "error": cell.error,
            "measures": cell.measures,
        }
        for cell in cells
    ]
    write_json(out / "sweep.json", {"notebook": notebook, "cells": rows})
    replace_text(out / "sweep.txt", text_table(cell_frame(cells)) + "\n")


def text_table(frame: pd.DataFrame) -> str:
    """Returns a table as text with aligned columns; missing values are empty, and seconds are whole."""
    columns = {
        str(name): ["" if pd.isna(x) else f"{x:.0f}" if name == "seconds" else str(x) for x in frame[name]]
        for name in frame
    }
    rows = list(zip(*([name, *values] for name, values in columns.items()), strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return printable("\n".join(lines))


class Screen:
    """Prints the rows of a table one by one, as cells end, with aligned columns."""

    def __init__(self, cells: Sequence[Cell], log: Any) -> None:
        self._names, self._log, self._cells = varying([cell.values for cell in cells]), log, list(cells)
        shown = [[_value(cell.values[name]) for cell in cells] for name in self._names]
        self._widths = [max(map(len, [name, *column])) for name, column in zip(self._names, shown, strict=True)]
        self._count, self._ended = len(str(len(cells))), 0
        self._print(
            "cell".rjust(max(4, 2 * self._count + 1)), self._names, "state", "seconds", "left", "measures or error"
        )

    def row(self, cell: Cell, left: str = "", error: str | None = None) -> None:
        """Prints the row of a cell that ended, with its number among those that have ended and the time left."""
        self._ended += 1
        number = f"{self._ended:>{self._count}}/{len(self._cells)}"
        values = [_value(cell.values[name]) for name in self._names]
        seconds = "" if cell.seconds is None else f"{cell.seconds:.0f}"
        error = error or (cell.error and f"{cell.error} ({cell.name})")
        self._print(
            number.rjust(max(4, 2 * self._count + 1)), values, cell.state, seconds, left, error or _first(cell.measures)
        )

    def _print(self, number: str, values: Sequence[str], *facts: str) -> None:
        state, seconds, left, text = facts
        columns = [value.ljust(width) for value, width in zip(values, self._widths, strict=True)]
        line = "  ".join([number, *columns, state.ljust(8), seconds.rjust(7), left.rjust(8), text])
        self._log(printable(line.rstrip()))


def _first(measures: Mapping[str, Mapping[str, float]]) -> str:
    """Formats one measure of each run."""
    found = {run: next((name for name in FIRST if name in values), None) for run, values in measures.items()}
    return ", ".join(f"{run} {name} {measures[run][name]:.4f}" for run, name in found.items() if name is not None)


def _value(value: Any) -> str:
    """Formats a parameter; an absolute path by its last part, since the table of `sweep.json` has the whole."""
    if isinstance(value, str) and value.startswith("/"):
        return f".../{Path(value).name}"
    return ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
