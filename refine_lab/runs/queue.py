"""Runs of both kinds taken in turn: two at once would only share the cores.

A run that waits for its turn counts as living, because whoever will start it holds its lock. That is the calling process,
or, detached, a process of its own: `python -m refine_lab.runs.queue RUN_DIR [RUN_DIR ...]`, which needs nobody. A training
run has a process of its own; runs of test-time training that follow each other share one, which loads their model once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile

from refine_lab.runs.child import LOCKS, inherited_locks
from refine_lab.runs.process import PYTHON, TRAINER, follow, hold, launch, spawn
from refine_lab.runs.run import Run
from refine_lab.runs.writer import write_status

BACKGROUND = "Training in the background (it survives closing this notebook):"

Queue = list[tuple[Run, int]]
"""Runs in their order, each with the descriptor of its lock."""


def run_in_turn(
    runs: Sequence[Run],
    *,
    detach: bool,
    every: float = 2.0,
    log: Callable[[str], object] = print,
    command: Sequence[str] = TRAINER,
) -> None:
    """Train, or adapt and answer, every run that has not finished; each is resumed where it ended.

    Detached, this returns at once, the work goes on whatever becomes of this process, and runs that a process works on
    already are left to it. Otherwise it waits, with a line of progress every few seconds; when waiting ends early, the run
    that is worked on saves and stops and the others do not begin. Raises RuntimeError with the last error where a run
    fails, and where another process works on one.
    """
    queue: Queue = []
    try:
        for run in runs:
            if (state := run.state) == "finished":
                log(f"{run.name} has finished already")
            elif detach and state in ("starting", "running"):
                log(f"{run.name} is {state} already")
            else:
                queue.append((run, hold(run)))
        if detach and queue:
            _start_driver(queue)
            log(BACKGROUND + "".join(f"\n  {run.path}" for run, _ in queue))
        elif queue:
            _run(queue, every, log, command)
    finally:
        for _, lock in queue:
            os.close(lock)


def require_finished(runs: Sequence[Run]) -> None:
    """Raise RuntimeError that says which runs are still worked on, or which ended before their last step and why."""
    states = {run: run.state for run in runs}
    working = [run for run, state in states.items() if state in ("starting", "running")]
    for run, state in states.items():
        if run not in working and state != "finished":
            status = run.status
            what = {"failed": "failed", "waiting": "has not begun"}.get(state, f"was {state}")
            reason = f": {status.error}" if status.error else ""
            raise RuntimeError(f"run {run.name} {what} at step {status.step} of {status.steps}{reason}")
    if working:
        steps = ", ".join(f"{run.name}: step {run.status.step} of {run.status.steps}" for run in working)
        raise RuntimeError(
            f"{len(working)} of {len(states)} runs are still in progress ({steps}); "
            "execute this cell and the cells below again when they have finished"
        )


def _run(
    queue: Queue, every: float, log: Callable[[str], object], command: Sequence[str], *, patient: bool = False
) -> None:
    """Work on the runs of `queue`, taking those of each process out of it; say so of those that never began.

    `patient`: a run that is stopped leaves the others their turn.
    """
    group: list[Run] = []
    try:
        while queue:
            size = len(list(takewhile(lambda each: each[0].kind == "answer", queue))) or 1
            part, queue[:] = queue[:size], queue[size:]
            group = [run for run, _ in part]
            locks = [lock for _, lock in part]
            try:
                process = launch(group, locks, detach=False, command=command)
            finally:
                for lock in locks:
                    os.close(lock)
            follow(process, every=every, log=log, patient=patient)
    except BaseException:
        begun = [run for run in group if run.status.state != "starting"] or group[:1]
        reason = f"it never began, since {begun[-1].name} did not finish"
        for run in group:
            if run not in begun and not run.alive:  # else another process has resumed it in the meantime
                write_status(run, "stopped", error=reason)
        for run, _ in queue:
            write_status(run, "stopped", error=reason)
        raise


def _start_driver(queue: Queue) -> None:
    """Start a process that inherits the locks and takes the runs in turn; what it prints ends in the last run's log."""
    runs, locks = zip(*queue, strict=True)
    with (runs[-1].path / "log.txt").open("ab") as output:
        command = [*PYTHON, "refine_lab.runs.queue", *(str(run.path) for run in runs)]
        spawn(command, output, inherit=locks, environ={LOCKS: ",".join(map(str, locks))})


def main(arguments: list[str]) -> None:
    """The detached queue: it prints nothing, since its runs' directories hold everything."""
    queue = list(zip(map(Run, arguments), inherited_locks(), strict=True))
    _run(queue, 2.0, lambda line: None, TRAINER, patient=True)


if __name__ == "__main__":
    main(sys.argv[1:])
