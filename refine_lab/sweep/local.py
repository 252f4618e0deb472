"""Starts cells as processes of this machine. A backend for a cluster would be another `Backend`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from refine_lab.runs.child import LOCKS, SAVE_SECONDS
from refine_lab.runs.durable import make_folder
from refine_lab.runs.files import name_holder, take_lock
from refine_lab.runs.process import PYTHON, spawn
from refine_lab.sweep.cells import Cell, last_line, prepare

COMMAND = (*PYTHON, "refine_lab.sweep.execute")
"""The command that takes the folder of a cell as its argument."""


class Execution(Protocol):
    """A cell that was started."""

    @property
    def ended(self) -> bool: ...

    def failure(self) -> str:
        """Returns one line about an execution that ended without a result."""
        ...

    def stop(self) -> None:
        """Asks the execution to stop, without waiting; its runs save first."""
        ...


class Backend(Protocol):
    """Prepares the folder of a cell and starts its process: `python -m refine_lab.sweep.execute FOLDER`."""

    def start(self, cell: Cell) -> Execution: ...


@dataclass(frozen=True)
class LocalExecution:
    """The process of a cell on this machine."""

    cell: Cell
    popen: subprocess.Popen[bytes]

    @property
    def ended(self) -> bool:
        """Returns whether the process has ended, and so have the processes of its runs."""
        return self.popen.returncode is not None and not any(run.alive for run in self.cell.runs)

    def failure(self) -> str:
        code = self.popen.returncode
        if code is not None and code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        log = (self.cell.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return last_line(log) or f"its process ended with exit status {code}"

    def stop(self) -> None:
        if self.popen.stdin:
            with suppress(OSError):
                self.popen.stdin.close()  # the process reads from this pipe, and stops when it closes

    def kill_late(self, deadline: float) -> None:
        """Kills the process if it has not ended at the `time.monotonic()` of `deadline`."""
        if self.popen.returncode is None and time.monotonic() > deadline:
            self.popen.kill()


@dataclass(frozen=True)
class LocalProcesses:
    """Starts processes on this machine, which share its cores: each gets `cpus / processes` threads."""

    processes: int = 1

    def start(self, cell: Cell) -> LocalExecution:
        """Starts the process of a cell. Raises RuntimeError if another process executes it."""
        make_folder(cell.folder)
        threads = str(max(1, (os.cpu_count() or 1) // self.processes))
        environ = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)} if self.processes > 1 else {}
        with take_lock(cell.folder) as lock, (cell.folder / "log.txt").open("ab") as log:
            prepare(cell)
            environ[LOCKS] = str(lock.fileno())
            command = [*COMMAND, str(cell.folder)]
            popen = spawn(command, log, inherit=[lock.fileno()], watched=True, environ=environ)
            name_holder(lock, popen.pid)
        return LocalExecution(cell, popen)


def stop_executions(executions: list[LocalExecution], seconds: float = SAVE_SECONDS) -> None:
    """Stops processes, and waits until they and their runs have ended; those that have not after `seconds` are killed."""
    for each in executions:
        each.stop()
    deadline = time.monotonic() + seconds
    while not all(each.ended for each in executions) and time.monotonic() < deadline + 10:
        for each in executions:
            each.kill_late(deadline)
        time.sleep(0.1)
