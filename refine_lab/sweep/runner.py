"""Executes the cells of a grid in local processes or on a Ray cluster, and resumes a sweep that was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd

from refine_lab.runs.durable import make_folder
from refine_lab.runs.files import require_locks, write_json
from refine_lab.runs.process import raised_sigterm
from refine_lab.runs.run import Run
from refine_lab.sweep.backend import Backend, Execution, stop_all
from refine_lab.sweep.cells import Cell, cell_of
from refine_lab.sweep.cluster import RayCluster, check_resources, require_ray
from refine_lab.sweep.grid import Grid, combinations, read_notebook
from refine_lab.sweep.local import LocalProcesses
from refine_lab.sweep.tables import Screen, cell_frame, write_tables
from refine_lab.validation import path_of, require

if TYPE_CHECKING:
    from refine_lab.sweep.estimate import Estimate

Log = Callable[[str], object]
MOST_PROCESSES = 256
"""Maximum number of cells that are executed at a time."""


@dataclass(frozen=True)
class Sweep:
    """The cells of a grid and the folder that they are in."""

    out: Path
    cells: tuple[Cell, ...]

    @property
    def notebook(self) -> str:
        return self.cells[0].notebook.name

    @property
    def runs(self) -> list[Run]:
        """Returns the runs of all cells, in the order of the cells."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def unfinished(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.state != "finished"]

    def frame(self) -> pd.DataFrame:
        """Returns one row per cell: the parameters that vary, state, seconds, a measure of each run, error and folder."""
        return cell_frame(self.cells)

    def require_finished(self) -> None:
        """Raises RuntimeError, which names the first cell that has not finished and its error, unless all have."""
        if left := self.unfinished:
            reason = f": {left[0].error}" if left[0].error else ""
            count = f"{len(left)} of {len(self.cells)} cells have not finished"
            raise RuntimeError(f"{count}; {left[0].folder} is {left[0].state}{reason}")

    def estimate(self, log: Log = print) -> Estimate:
        """Estimates the seconds and the disk space that the unfinished cells need, by timing a part of their work."""
        from refine_lab.sweep.estimate import estimated  # loads torch

        return estimated(self.cells, log)


def plan(notebook: Path | str, grid: Grid | Sequence[Grid], out: Path | str) -> Sweep:
    """Returns the cells of a grid, finished or not; nothing is created or executed. Arguments and errors as in `sweep`."""
    read, folder = read_notebook(notebook), path_of("out", out).absolute()
    require(isinstance(grid, Mapping) or len(grid) > 0, "grid", grid, "a grid, or a list of at least one")
    require(folder.is_dir() or not folder.exists(), "out", str(out), "a folder, or a path where one can be created")
    cells = tuple(cell_of(folder, read, values) for values in combinations(read, grid))
    if "recipe" in read.parameters:
        from refine_lab.sweep.configs import cell_configs  # loads torch

        for cell in cells:
            cell_configs(cell)  # rejects what the notebook would reject
    return Sweep(folder, cells)


def sweep(
    notebook: Path | str,
    grid: Grid | Sequence[Grid],
    out: Path | str,
    *,
    processes: int | None = None,
    ray: str | None = None,
    cpus: int = 1,
    gpus: int | float = 0,
    log: Log = print,
) -> Sweep:
    """Executes a notebook for every combination of parameter values, each in a process and a folder of its own.

    `notebook` is a path, or the name of one of the project's notebooks, such as "midtrain". `grid` maps parameters to a
    value or to a list of values; a sequence of grids is their union, in which a cell that several contain is executed
    once. Values have the types that the notebook declares; for a list such as `seeds`, each item of `[0, 1]` is one
    value, a list of one number, and `[[0, 1]]` is one value with both. The parameters output, report, detach and fresh
    are set for each cell.

    A finished cell is not executed again. One that was interrupted or failed is, and its notebook continues the runs
    that are in its folder. A cell whose notebook (its code) or parameters have changed is another cell. Files that a
    parameter names do not count, nor does the code of this package. `processes` cells are executed at a time (1). Rows
    of the table are passed to `log` as cells end, and `sweep.json` and `sweep.txt` in `out` hold the whole table.

    With `ray`, the address of a Ray cluster whose nodes share `out` and this checkout, the cluster executes as many
    cells at a time as it has room for, at most `processes`; each is given `cpus` cores and `gpus` GPUs. A cell whose
    node was lost is executed again on another one, where its runs continue from their checkpoints.

    A failed cell does not stop the others: its row has the last line of its error. See `Sweep.require_finished`. If
    waiting ends early (an interrupt, SIGTERM), the processes stop after their runs have saved.

        result = refine_lab.sweep("midtrain", {"lr": [1e-4, 3e-4], "seeds": range(8), "steps": 25}, "runs/lr")
        result.frame()                                      # a row per cell
        [(cell.values["lr"], cell.runs) for cell in result.cells]

    Raises ValueError or FileNotFoundError, before anything is created, for an unknown parameter, a value of another
    type, a value that the recipe's configuration refuses, and a notebook without declared parameters.
    """
    check_places(processes, ray, cpus, gpus)
    result = plan(notebook, grid, out)
    with raised_sigterm(), _backend(processes, ray, cpus, gpus, log) as backend:
        make_folder(result.out)
        require_locks(result.out)
        _execute(result, backend, log)
    return result


def check_places(processes: int | None, ray: str | None = None, cpus: int = 1, gpus: int | float = 0) -> None:
    """Raises ConfigError unless that many cells can be executed at a time, with these cores and GPUs each.

    Cores and GPUs are only for a Ray cluster, which reserves them, and for which Ray must be installed.
    """
    allowed = f"from 1 to {MOST_PROCESSES}"
    require(processes is None or 1 <= processes <= MOST_PROCESSES, "processes", processes, allowed)
    check_resources(cpus, gpus)
    for name, value, default in (("cpus", cpus, 1), ("gpus", gpus, 0)):
        allowed = f"{default} without the address of a Ray cluster (ray)"
        require(ray is not None or value == default, name, value, allowed)
    if ray is not None:
        require(bool(ray.strip()), "ray", ray, "the address of a Ray cluster, such as auto or host:6379")
        require_ray()


def _backend(
    processes: int | None, ray: str | None, cpus: int, gpus: int | float, log: Log
) -> AbstractContextManager[Backend]:
    if ray is None:
        return nullcontext(LocalProcesses(processes or 1))
    return RayCluster(ray, cpus=cpus, gpus=gpus, most=processes or MOST_PROCESSES, log=log)


def _execute(result: Sweep, backend: Backend, log: Log) -> None:
    """Executes the unfinished cells, `backend.submitted` at a time."""
    waiting, screen = result.unfinished, Screen(result.cells, log)
    left = {cell.folder for cell in waiting}
    for cell in result.cells:
        if cell.folder not in left:
            screen.row(cell)
    clock = _Clock(len(waiting), backend)
    running: list[Execution] = []
    try:
        while waiting or running:
            while waiting and len(running) < backend.submitted:
                running += _started(waiting.pop(0), backend, screen)
            ended = [each for each in running if each.ended]
            running = [each for each in running if each not in ended]
            for each in ended:
                _settle(each)
                screen.row(each.cell, clock.left(each.cell))
            if ended:
                write_tables(result.out, result.notebook, result.cells)
            time.sleep(0.1)
    except BaseException:
        log(f"Stopping {len(running)} processes after their runs have saved.")
        stop_all(running)
        raise
    finally:
        write_tables(result.out, result.notebook, result.cells)


def _started(cell: Cell, backend: Backend, screen: Screen) -> list[Execution]:
    """Starts a cell; one that another process executes is left to it."""
    try:
        return [backend.start(cell)]
    except RuntimeError as error:
        screen.row(cell, error=str(error))
        return []


def _settle(execution: Execution) -> None:
    """Writes the result of a process that ended without one, unless another process executes the cell."""
    cell = execution.cell
    if not cell.result and cell.state != "running":
        facts: dict[str, Any] = {"state": "failed", "error": execution.failure(), "seconds": None}
        write_json(cell.folder / "result.json", {**facts, "time": time.time()})


class _Clock:
    """Estimates the time left from the mean time of the cells that have ended."""

    def __init__(self, total: int, backend: Backend) -> None:
        self._left, self._backend, self._seconds = total, backend, list[float]()

    def left(self, cell: Cell) -> str:
        """Returns the time left after `cell` has ended, as minutes and seconds; empty after the last one."""
        self._left -= 1
        self._seconds += [cell.seconds] if cell.seconds else []
        if not self._left or not self._seconds:
            return ""
        seconds = fmean(self._seconds) * self._left / min(self._backend.processes, self._left)
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
