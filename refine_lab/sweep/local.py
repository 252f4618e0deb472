"""Starts cells as processes on this machine."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass

from refine_lab.runs.child import LOCKS
from refine_lab.runs.durable import make_folder
from refine_lab.runs.files import name_holder, take_lock
from refine_lab.runs.process import PYTHON, spawn
from refine_lab.sweep.cells import Cell, last_line, prepare
from refine_lab.text import signal_name

COMMAND = (*PYTHON, "refine_lab.sweep.execute")
"""The command that takes the folder of a cell as its argument."""


@dataclass(eq=False)
class LocalExecution:
    """The process of a cell on this machine (see `backend.Execution`)."""

    cell: Cell
    popen: subprocess.Popen[bytes]

    @property
    def ended(self) -> bool:
        return self.popen.returncode is not None and not any(run.alive for run in self.cell.runs)

    def failure(self) -> str:
        code = self.popen.returncode
        if code is not None and code < 0:
            return f"its process was killed by {signal_name(-code)}"
        log = (self.cell.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return last_line(log) or f"its process ended with exit status {code}"

    def stop(self) -> None:
        if self.popen.stdin:
            with suppress(OSError):
                self.popen.stdin.close()  # the process reads from this pipe, and stops when it closes

    def kill(self) -> None:
        if self.popen.returncode is None:
            self.popen.kill()


@dataclass
class LocalProcesses:
    """Starts processes on this machine, which share its cores: each gets `cpus / processes` threads."""

    processes: int = 1

    @property
    def submitted(self) -> int:
        return self.processes

    def start(self, cell: Cell) -> LocalExecution:
        """Starts the process of a cell. Raises RuntimeError if another process executes it or has finished it."""
        make_folder(cell.folder)
        threads = str(max(1, (os.cpu_count() or 1) // self.processes))
        environ = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)} if self.processes > 1 else {}
        with take_lock(cell.folder) as lock, (cell.folder / "log.txt").open("ab") as log:
            if cell.result.get("state") == "finished":
                raise RuntimeError(f"{cell.name} has been finished by another process")
            prepare(cell)
            environ[LOCKS] = str(lock.fileno())
            command = [*COMMAND, str(cell.folder)]
            popen = spawn(command, log, inherit=[lock.fileno()], watched=True, environ=environ)
            name_holder(lock, popen.pid)
        return LocalExecution(cell, popen)
