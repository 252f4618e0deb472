"""The process of one cell: `python -m refine_lab.sweep.execute FOLDER` executes the notebook of a cell's folder.

It needs nothing but the folder, whose `cell.json` and `source.ipynb` are complete, and writes its result there, so that
it can also be started by hand or on another machine. It stops if its starter closes the pipe or ends: the kernel is then
shut down, and runs save and stop.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from refine_lab.runs.child import WATCH_FD, inherited_locks, watch_parent
from refine_lab.runs.files import read_json, take_lock, write_json
from refine_lab.runs.run import list_runs
from refine_lab.sweep.cells import last_line, measured


def main(arguments: list[str]) -> int:
    """Executes the cell and returns the exit status: 0 if it finished, 1 if it failed."""
    folder = Path(arguments[0]).absolute()
    locks = inherited_locks([folder]) or [take_lock(folder)]  # held until this process ends
    stopping: list[bool] = []

    def stop() -> None:
        stopping.append(True)
        os.kill(os.getpid(), signal.SIGTERM)  # papermill then shuts the kernel down

    if watched := os.environ.pop(WATCH_FD, None):
        watch_parent(int(watched), stop)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cell, began = read_json(folder / "cell.json"), time.monotonic()
    error = _error(folder, cell)
    state = "stopped" if stopping else "failed" if error else "finished"
    seconds = cell["seconds_before"] + time.monotonic() - began
    output = folder / "output"
    measures = measured(list_runs(output)) if output.is_dir() else {}
    result = {"state": state, "seconds": seconds, "error": None if stopping else error, "measures": measures}
    write_json(folder / "result.json", {**result, "time": time.time()})
    for lock in locks:
        lock.close()
    return 0 if state == "finished" else 1


def _error(folder: Path, cell: dict[str, Any]) -> str | None:
    """Executes the notebook; returns the last line of the error that stopped it, or None."""
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import execute_notebook

    executed = str(folder / cell["notebook"]).replace("{", "{{").replace("}", "}}")  # papermill formats this path
    source = str(folder / "source.ipynb").replace("{", "{{").replace("}", "}}")
    try:
        execute_notebook(source, executed, cell["parameters"], progress_bar=False, log_output=True)
    except PapermillExecutionError as error:
        return f"{error.ename}: {last_line(error.evalue)}" if error.evalue.strip() else str(error.ename)
    except Exception as error:  # whatever it is, the table names it; the traceback is in the log
        logging.exception("the notebook could not be executed")
        return f"{type(error).__name__}: {last_line(str(error))}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
