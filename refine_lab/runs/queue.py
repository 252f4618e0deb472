"""Executes training and answering runs one after another, since parallel runs would compete for the same cores.

A waiting run counts as alive, because the process that will start it holds its lock. That is the calling process or, if
detached, a separate one: `python -m refine_lab.runs.queue RUN_DIR [RUN_DIR ...]`, which runs independently. A training
run has its own process; consecutive runs of test-time training share one, which loads their model once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import takewhile
from typing import BinaryIO

from refine_lab.runs.child import inherited_locks
from refine_lab.runs.files import LockLostError
from refine_lab.runs.process import PYTHON, TRAINER, Log, follow, hold, launch, safe_log
from refine_lab.runs.run import Run
from refine_lab.runs.writer import write_status
from refine_lab.text import printable

BACKGROUND = "Running in the background; you may close this notebook:"

Queue = list[tuple[Run, BinaryIO]]
"""Runs in order, each with its lock."""


def run_in_turn(
    runs: Sequence[Run],
    *,
    detach: bool,
    every: float = 2.0,
    log: Log = print,
    command: Sequence[str] = TRAINER,
) -> None:
    """Executes every unfinished run, one after another; each resumes where it ended.

    If detached, this returns at once, the work continues even if this process ends, and runs that another process works
    on are left to it. Otherwise it waits, printing progress every few seconds; if waiting ends early, the current run
    saves and stops and the others do not begin. Raises RuntimeError with the last error if a run fails, and if another
    process works on one.
    """
    queue: Queue = []
    log = safe_log(log)
    with ExitStack() as locks:
        for run in runs:
            if (state := run.state) == "finished":
                log(f"{run.name} has already finished")
            elif detach and state in ("starting", "running"):
                log(f"{run.name} is already {state}")
            else:
                queue.append((run, locks.enter_context(hold(run))))
        if detach and queue:
            launch(queue, detach=True, command=[*PYTHON, "refine_lab.runs.queue"], log=queue[-1][0])
            log(BACKGROUND + "".join(f"\n  {run.path}" for run, _ in queue))
        elif queue:
            _run(queue, every, log, command)


class UnfinishedError(RuntimeError):
    """The error of runs that have not finished; a notebook shows its sentence without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def wait_until_finished(runs: Sequence[Run], *, every: float = 2.0) -> None:
    """Waits for the runs that are in progress, printing how far they are in one line, then raises as `require_finished`.

    It prints nothing if no run is in progress. An interrupt ends the waiting, not the runs.
    """
    waited = False
    while working := [run for run in runs if run.state in ("starting", "running")]:
        now = next((run for run in working if run.state == "running"), working[0])
        ended = len(runs) - len(working)
        progress = f"{ended} of {len(runs)} runs have ended; {now.name} is at step {now.status.step} of "
        print(f"\r{printable(progress)}{now.status.steps:<20}", end="", flush=True)
        waited = True
        time.sleep(every)
    if waited:
        print(f"\r{f'All {len(runs)} runs have ended.':<120}")
    require_finished(runs)


def require_finished(runs: Sequence[Run]) -> None:
    """Raises `UnfinishedError` unless all runs have finished; it names those in progress, or one that ended early and why."""
    working = []
    for run in runs:
        state, status = run.state, run.status
        where = f"step {status.step} of {status.steps}"
        if state in ("starting", "running"):
            working.append(f"{run.name}: {where}")
        elif state != "finished":
            what = f"{'failed' if state == 'failed' else f'was {state}'} at {where}"
            if state == "waiting":
                what = f"has not started ({status.step} of {status.steps} steps)"
            reason = f": {status.error}" if status.error else ""
            raise UnfinishedError(printable(f"run {run.name} {what}{reason}"))
    if working:
        raise UnfinishedError(
            f"{len(working)} of {len(runs)} runs are still in progress ({printable(', '.join(working))}); "
            "execute this cell and the cells below again when they have finished"
        )


def _run(queue: Queue, every: float, log: Log, command: Sequence[str], *, patient: bool = False) -> None:
    """Executes the runs of `queue`, removing each process's runs from it; marks those that never started.

    If `patient`, the queue continues after a run is stopped.
    """
    group: list[Run] = []
    try:
        while queue:
            size = len(list(takewhile(lambda each: each[0].kind == "answer", queue))) or 1
            part, queue[:] = queue[:size], queue[size:]
            group = [run for run, _ in part]
            with ExitStack() as locks:
                for _, lock in part:
                    locks.enter_context(lock)
                process = launch(part, detach=False, command=command, log=group[0])
            follow(process, every=every, log=log, patient=patient)
    except BaseException:
        begun = [run for run in group if run.status.state != "starting"] or group[:1]
        reason = f"never started because {begun[-1].name} did not finish"
        for run in group:
            if run not in begun and not run.alive:  # else another process has resumed it in the meantime
                write_status(run, "stopped", error=reason)
        for run, _ in queue:
            with suppress(LockLostError):  # another process works on it
                write_status(run, "stopped", error=reason)
        raise


def main(arguments: list[str]) -> None:
    """Executes the detached queue; it prints nothing, since the run directories contain everything."""
    runs = [Run(path) for path in arguments]
    queue = list(zip(runs, inherited_locks([run.path for run in runs]), strict=True))
    _run(queue, 2.0, lambda line: None, TRAINER, patient=True)


if __name__ == "__main__":
    main(sys.argv[1:])
