"""Several runs one after the other: two at once would only share the cores.

A run that waits for its turn counts as living, because whoever will start it holds its lock. That is the calling process,
or, detached, a process of its own: `python -m refine_lab.run_queue LOCK RUN_DIR [LOCK RUN_DIR ...]`, which needs nobody.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from refine_lab.environment import project_root
from refine_lab.launch import SAVE_SECONDS, TRAINER, follow, resume
from refine_lab.records import Run, RunWriter
from refine_lab.run_files import take_lock

Queue = list[tuple[Run, int]]
"""Runs in their order, each with the descriptor of its lock."""


def train_in_turn(
    runs: Sequence[Run],
    *,
    detach: bool,
    every: float = 2.0,
    log: Callable[[str], object] = print,
    command: Sequence[str] = TRAINER,
) -> None:
    """Train every run that has not finished, from its last checkpoint where it has one.

    Detached, this returns at once and training goes on whatever becomes of this process. Otherwise it waits, with a line
    of progress every few seconds; when waiting ends early, the run that trains saves and stops and the others do not
    begin. Raises RuntimeError with the last error where a run fails, and where one is being trained already.
    """
    queue: Queue = []
    try:
        for run in runs:
            if run.state == "finished":
                log(f"{run.name} has finished already")
            else:
                queue.append((run, _hold(run)))
        if detach and queue:
            _start_driver(queue)
        elif queue:
            _train(queue, every, log, command)
    finally:
        for _, lock in queue:
            os.close(lock)
    if detach and queue:
        paths = (f"\n  {run.path}" for run, _ in queue)
        log("Training in the background (it survives closing this notebook):" + "".join(paths))


def stop_all(runs: Sequence[Run], timeout: float = SAVE_SECONDS) -> None:
    """Ask every run of a queue to save and stop, or not to begin, and wait until all have.

    Raises TimeoutError where one has not in `timeout` seconds.
    """
    living = [run for run in runs if run.alive]
    for run in living:
        (run.path / "stop").touch()
    deadline = time.monotonic() + timeout
    while left := [run.name for run in living if run.alive]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{left[0]} was asked to stop and has not after {timeout:g} s")
        time.sleep(0.1)


def require_finished(runs: Sequence[Run]) -> None:
    """Raise RuntimeError that says which runs still train, or which ended before their last step and why."""
    states = {run: run.state for run in runs}
    waiting = [run.name for run, state in states.items() if state in ("starting", "running")]
    for run, state in states.items():
        if state not in ("starting", "running", "finished"):
            status = run.status
            reason = f": {status.error}" if status.error else ""
            what = state if state == "failed" else f"was {state}"
            raise RuntimeError(f"run {run.name} {what} at step {status.step} of {status.steps}{reason}")
    if waiting:
        raise RuntimeError(
            f"{len(waiting)} of {len(states)} runs are still training ({', '.join(waiting)}); "
            "execute this cell and the cells below again when they have finished"
        )


def _hold(run: Run) -> int:
    """Take a run's lock, drop an earlier request to stop, and say that it will start."""
    try:
        lock = take_lock(run.path)
    except BlockingIOError:
        raise RuntimeError(f"run {run.name} is being trained by another process; stop that one first") from None
    (run.path / "stop").unlink(missing_ok=True)
    step, _ = run.latest_checkpoint() or (0, None)
    with RunWriter(run.path, step=step) as writer:
        writer.status("starting")
    return lock


def _train(
    queue: Queue, every: float, log: Callable[[str], object], command: Sequence[str], *, patient: bool = False
) -> None:
    """Train the runs of `queue`, taking each out of it when its turn comes; say so of those that never began.

    `patient`: a run that is stopped leaves the others their turn.
    """
    try:
        while queue:
            run, lock = queue.pop(0)
            os.close(lock)  # taken again below, for the run's own process
            if (run.path / "stop").exists():
                _say_stopped(run, "a stop was requested")
                continue
            try:
                follow(resume(run, detach=False, command=command), every=every, log=log)
            except RuntimeError:
                if not (patient and run.status.state == "stopped"):
                    raise
    except BaseException:
        for waiting, _ in queue:
            _say_stopped(waiting, f"it never began, since {run.name} did not finish")
        raise


def _say_stopped(run: Run, reason: str) -> None:
    with RunWriter(run.path, step=run.status.step) as writer:
        writer.status("stopped", error=reason)


def _start_driver(queue: Queue) -> None:
    """A process that inherits the locks and trains; what it prints ends in the last run's log."""
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if root := project_root():
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environ.get("PYTHONPATH"))))
    arguments = [word for run, lock in queue for word in (str(lock), str(run.path))]
    with (queue[-1][0].path / "log.txt").open("ab") as output:
        driver = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "refine_lab.run_queue", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            pass_fds=[lock for _, lock in queue],
            start_new_session=True,  # neither Ctrl-C nor the end of a kernel's process group reaches it
        )
    threading.Thread(target=driver.wait, name=f"reap-{driver.pid}", daemon=True).start()


def main(arguments: list[str]) -> None:
    """The detached queue: it says nothing, its runs' directories say all."""
    queue = [(Run(path), int(lock)) for lock, path in zip(arguments[::2], arguments[1::2], strict=True)]
    for _, lock in queue:
        os.set_inheritable(lock, False)
    _train(queue, 2.0, lambda line: None, TRAINER, patient=True)


if __name__ == "__main__":
    main(sys.argv[1:])
