"""A cell of a grid: its folder, which files it holds, and its state.

cell.json       the parameters of the cell, written before it begins     output/      its runs, or other results
source.ipynb    the notebook as it was then                              report.html  the page that the notebook saves
<name>.ipynb    the executed notebook                                    log.txt      the output of its process
result.json     state, seconds and error, once the process has ended     lock         held while the process lives
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from refine_lab.data.tasks.scores import SCORES
from refine_lab.runs.durable import replace_bytes, short_digest
from refine_lab.runs.files import is_held, read_json, write_json
from refine_lab.runs.run import Run, list_runs
from refine_lab.sweep.grid import Notebook, changed
from refine_lab.text import printable

State = Literal["waiting", "running", "finished", "failed", "stopped"]
SLUG = 80
"""Maximum number of characters of the values in a folder's name."""


@dataclass(frozen=True)
class Cell:
    """One execution of a notebook, whose folder is named after its values and a digest of all parameters and the code.

    The folder need not exist. A cell whose notebook or parameters have changed is another cell, in another folder.
    """

    folder: Path
    notebook: Notebook
    values: Mapping[str, Any]
    "Every parameter of the notebook, except those that the sweep sets."

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def executed(self) -> Path:
        """Returns the path of the executed notebook."""
        return self.folder / self.notebook.path.name

    @property
    def output(self) -> Path:
        """Returns the folder that the notebook's parameter `output` names."""
        return self.folder / "output"

    @property
    def parameters(self) -> dict[str, Any]:
        """Returns the parameters that papermill passes: the values that are not defaults, and those that the sweep sets."""
        own = {"output": str(self.output), "report": str(self.folder / "report.html"), "detach": False, "fresh": False}
        own = {name: value for name, value in own.items() if name in self.notebook.parameters}
        return changed(self.notebook, self.values) | own

    @property
    def result(self) -> dict[str, Any]:
        """Returns the content of `result.json`; empty if the process has not ended."""
        with suppress(FileNotFoundError):
            return read_json(self.folder / "result.json")
        return {}

    @property
    def state(self) -> State:
        """Returns `stopped` for a cell that began and whose process ended without a result, for example by a kill."""
        if is_held(self.folder):
            return "running"
        return self.result.get("state") or ("stopped" if (self.folder / "cell.json").is_file() else "waiting")

    @property
    def error(self) -> str | None:
        """Returns the last line of the error of a failed cell."""
        return self.result.get("error")

    @property
    def seconds(self) -> float | None:
        """Returns how long the execution took, over all its continuations."""
        return self.result.get("seconds")

    @property
    def runs(self) -> list[Run]:
        """Returns the runs of the cell, in the order of their creation."""
        return list_runs(self.output) if self.output.is_dir() else []

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        """Returns the last held-out measures by run: those of the last evaluation, or the mean scores of the answers."""
        return self.result.get("measures") or {}


def cell_of(out: Path, notebook: Notebook, values: Mapping[str, Any]) -> Cell:
    """Returns the cell with these values below the folder `out`."""
    text = json.dumps({"code": notebook.digest, "values": values}, sort_keys=True)
    digest = short_digest(hashlib.sha256(text.encode()))[:10]
    slug = "_".join(f"{name}={_short(value)}" for name, value in changed(notebook, values).items())
    return Cell(out / "-".join(filter(None, (notebook.name, slug[:SLUG], digest))), notebook, values)


def prepare(cell: Cell) -> None:
    """Writes what the process of a cell reads into its folder, which exists; an earlier result is removed."""
    replace_bytes(cell.folder / "source.ipynb", cell.notebook.content)
    facts = {"notebook": cell.notebook.path.name, "digest": cell.notebook.digest, "values": dict(cell.values)}
    seconds = cell.seconds or 0.0
    (cell.folder / "result.json").unlink(missing_ok=True)
    write_json(cell.folder / "cell.json", {**facts, "parameters": cell.parameters, "seconds_before": seconds})


def measured(runs: Iterable[Run]) -> dict[str, dict[str, float]]:
    """Returns the finite last held-out measures of runs, by method and seed."""
    found = {f"{run.config.method} s{run.config.seed}": _measures(run) for run in runs}
    return {run: {name: each for name, each in values.items() if isfinite(each)} for run, values in found.items()}


def last_line(text: str) -> str:
    """Returns the last line of a text that is not blank."""
    return printable(([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1])


def _measures(run: Run) -> dict[str, float]:
    if run.kind == "answer":
        answers = run.answers()
        return {name: float(answers[name].mean()) for name in SCORES if len(answers) and name in answers}
    evaluations = run.evaluations().drop(columns=["step", "time"])
    return {str(name): float(value) for name, value in evaluations.iloc[-1].items()} if len(evaluations) else {}


def _short(value: Any) -> str:
    """Formats a value for a folder's name: a path by its last part, and only characters that no shell acts on."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text.rstrip("/").rpartition("/")[2], flags=re.ASCII)[:30]
