"""The interface between the runner and the place where cells are executed: `local`, or `cluster` for Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from refine_lab.runs.child import SAVE_SECONDS
from refine_lab.sweep.cells import Cell


@runtime_checkable
class Execution(Protocol):
    """A cell that was started."""

    cell: Cell

    @property
    def ended(self) -> bool:
        """Returns whether the process of the cell and those of its runs have ended."""
        ...

    def failure(self) -> str:
        """Returns one line about a process that ended without a result."""
        ...

    def stop(self) -> None:
        """Asks the process to stop, without waiting; its runs save first."""
        ...

    def kill(self) -> None:
        """Ends the process at once; nothing happens if it has ended."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Starts cells: each is the command `python -m refine_lab.sweep.execute FOLDER`."""

    @property
    def processes(self) -> int:
        """Returns the number of cells that are executed at a time."""
        ...

    @property
    def submitted(self) -> int:
        """Returns the number of cells that are started at a time; those beyond `processes` wait for a scheduler."""
        ...

    def start(self, cell: Cell) -> Execution:
        """Prepares the folder of a cell and starts its process.

        Raises RuntimeError if another process executes the cell or has finished it.
        """
        ...


def stop_all(executions: Sequence[Execution], seconds: float = SAVE_SECONDS) -> None:
    """Stops executions and waits until they have ended; those that have not after `seconds` are killed."""
    for each in executions:
        each.stop()
    deadline = time.monotonic() + seconds
    while not all(each.ended for each in executions):
        if time.monotonic() > deadline:
            for each in executions:
                each.kill()
            return
        time.sleep(0.1)
