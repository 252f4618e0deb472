"""The code inside a run's process: it holds the lock, and reacts to signals, the exit of its parent and stop requests."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from refine_lab.runs.files import keep_lock, lock_file, require_lock, take_lock
from refine_lab.runs.run import Run

LOCKS, WATCH_FD = "REFINE_LOCK_FDS", "REFINE_WATCH_FD"
"""Environment variables that give a child the descriptors of its runs' locks and of the parent's pipe."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The first of these signals requests a stop; the second one ends the process at once."""

SAVE_SECONDS = 120.0
"""Maximum time for a run to save before it is killed, once the process that started it has requested a stop or has exited."""


class StopSignal:
    """Records whether a process has been asked to stop working on a run."""

    def __init__(self, run_dir: Path, lock: BinaryIO | None = None) -> None:
        self._run = run_dir
        self._file = run_dir / "stop"
        self._reason: str | None = None
        self._lock = lock

    def set(self, reason: str) -> None:
        self._reason = self._reason or reason

    def requested(self) -> str | None:
        """Returns why the process should save and stop, or None; called between two steps.

        Raises LockLostError, as `require_lock`.
        """
        require_lock(self._run)
        if self._reason is None and self._file.exists():
            self.set("a stop was requested")
        if self._reason is None and self._lock is not None and lock_file(self._lock, self._run) != "held":
            self.set("the run's lock file was deleted, so that another process could have started to work on the run")
        return self._reason

    def release(self) -> None:
        """Releases the run's lock, which shows that no process is working on the run."""
        if self._lock is not None:
            self._lock.close()


def child_setup(*run_dirs: Path | str, writes: bool = True) -> list[StopSignal]:
    """Sets up a run's process before any slow work: holds the locks, and watches signals, parent and stop files.

    A worker that does not write the run directory holds no lock (`writes` is False).
    Returns one signal per run. Raises RuntimeError if another process works on one of `run_dirs`, and FileNotFoundError
    if one is not a run directory.
    """
    paths = [Run(run_dir).path for run_dir in run_dirs]
    locks: list[BinaryIO] | list[None] = inherited_locks(paths) if writes else [None] * len(paths)
    if not locks:  # started by hand
        locks = [take_lock(path) for path in paths]
        for path in paths:
            (path / "stop").unlink(missing_ok=True)
    signals = [StopSignal(path, lock) for path, lock in zip(paths, locks, strict=True)]

    def stop_each(reason: str) -> None:
        for each in signals:
            each.set(reason)

    def interrupt(number: int, frame: object) -> None:
        stop_each(f"stopped by {signal.Signals(number).name}")
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # a second signal ends the process at once

    for each in SIGNALS:
        signal.signal(each, interrupt)
    if watched := os.environ.pop(WATCH_FD, None):
        watch_parent(int(watched), lambda: _outlive_parent(stop_each))
    return signals


def inherited_locks(run_dirs: Sequence[Path]) -> list[BinaryIO]:
    """Returns the files of the inherited locks, in the order of the run directories; an empty list if there are none."""
    fds = [int(lock) for lock in os.environ.pop(LOCKS, "").split(",") if lock]
    pairs = zip(fds, run_dirs, strict=True) if fds else ()
    locks: list[BinaryIO] = [keep_lock(os.fdopen(fd, "ab"), run_dir) for fd, run_dir in pairs]
    for lock in locks:
        os.set_inheritable(lock.fileno(), False)
    return locks


def _outlive_parent(stop: Callable[[str], object]) -> None:
    """Requests the stop, and kills the process if it hangs, since no parent is left to do so."""
    stop("the process that started it has exited")
    time.sleep(SAVE_SECONDS)  # in a daemon thread: a process that has saved does not wait for it
    print(f"the parent process exited and this run did not save within {SAVE_SECONDS:g} s; killing it", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_parent(fd: int, on_death: Callable[[], object]) -> threading.Thread:
    """Starts a thread that calls `on_death` when the pipe that `fd` reads from has no writer left."""

    def watch() -> None:
        while os.read(fd, 1024):
            pass
        on_death()

    thread = threading.Thread(target=watch, name="watch-parent", daemon=True)
    thread.start()
    return thread
