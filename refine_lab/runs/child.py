"""The side of a run's own process: it holds the lock, and heeds signals, its parent's end and a request to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from refine_lab.runs.files import take_lock
from refine_lab.runs.run import Run

LOCKS, WATCH_FD = "REFINE_LOCK_FDS", "REFINE_WATCH_FD"
"""Environment variables that tell a child which of its descriptors are its runs' locks and the parent's pipe."""

SAVE_SECONDS = 120.0
"""How long a run may take to save before it is killed, where whoever started it wants it stopped or is no more."""


class StopSignal:
    """A process's own knowledge of whether it is asked to stop working on a run."""

    def __init__(self, run_dir: Path, lock: int | None = None) -> None:
        self._file = run_dir / "stop"
        self._reason: str | None = None
        self._lock = lock

    def set(self, reason: str) -> None:
        self._reason = self._reason or reason

    def requested(self) -> str | None:
        """Why the process should save and stop, or None; asked between two steps."""
        if self._reason is None and self._file.exists():
            self.set("a stop was requested")
        return self._reason

    def release(self) -> None:
        """Give the run's lock back: whoever asks is told that nobody works on the run any more."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def child_setup(*run_dirs: Path | str) -> list[StopSignal]:
    """A run process's side, called before anything slow: hold the locks, heed signals, parent and stop files.

    Returns a signal a run. Raises RuntimeError where another process works on one of `run_dirs`, FileNotFoundError where
    one is no run directory.
    """
    paths = [Run(run_dir).path for run_dir in run_dirs]
    locks = inherited_locks()
    if not locks:  # started by hand
        for path in paths:
            locks.append(lock_for_work(path))
            (path / "stop").unlink(missing_ok=True)
    signals = [StopSignal(path, lock) for path, lock in zip(paths, locks, strict=True)]

    def stop_each(reason: str) -> None:
        for each in signals:
            each.set(reason)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop_each(f"stopped by {signal.Signals(number).name}"))
    if watched := os.environ.pop(WATCH_FD, None):
        watch_parent(int(watched), lambda: _outlive_parent(stop_each))
    return signals


def inherited_locks() -> list[int]:
    """The descriptors of the locks that this process was given, in the order of its run directories."""
    locks = [int(lock) for lock in os.environ.pop(LOCKS, "").split(",") if lock]
    for lock in locks:
        os.set_inheritable(lock, False)
    return locks


def _outlive_parent(stop: Callable[[str], object]) -> None:
    """Ask for the stop, and end a process that hangs: nobody is left who would."""
    stop("the process that started it ended")
    time.sleep(SAVE_SECONDS)  # in a daemon thread: a process that has saved does not wait for it
    print(f"the process that started it ended, and it has not saved in {SAVE_SECONDS:g} s: killed", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_parent(fd: int, on_death: Callable[[], object]) -> threading.Thread:
    """Call `on_death` from a thread when the pipe that `fd` reads from has no writer any more."""

    def watch() -> None:
        while os.read(fd, 1024):
            pass
        on_death()

    thread = threading.Thread(target=watch, name="watch-parent", daemon=True)
    thread.start()
    return thread


def lock_for_work(path: Path) -> int:
    """Take a run's lock. Raises RuntimeError where another process holds it."""
    try:
        return take_lock(path)
    except BlockingIOError:
        raise RuntimeError(f"run {path.name} is in use by another process; stop that one first") from None
