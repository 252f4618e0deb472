"""Finds a worker that has failed, ended or become silent, and ends the other workers, so that no one waits for it.

Every worker reports to a store each second, and reads what the others have reported. The error of the run names the lost
worker. The run then resumes from its last checkpoint, with any number of workers.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch.distributed as dist

from refine_lab.runs.run import Run
from refine_lab.runs.writer import write_status
from refine_lab.text import printable, shorten, signal_name
from refine_lab.workers import Workers, of_exchange

JOIN_SECONDS = 300.0
"""Maximum time until a worker reports for the first time."""
SILENT_SECONDS = 20.0
"""A worker that has reported nothing for this time is lost."""
GRACE_SECONDS = 5.0
"""Time for a worker to end by itself after another one is lost; then its process is ended, since it may wait forever."""

leave = os._exit
"""Ends this process at once. (`__main__` replaces `os._exit` while a run is executed.)"""


class WorkerLostError(RuntimeError):
    """Another worker has failed, ended, or stayed silent."""


class Watch:
    """A thread that reports for this worker and watches the others, while the block is executed.

    An error of this worker inside the block is reported to the others, and one that another worker has caused is replaced
    by a `WorkerLostError`.
    """

    def __init__(self, run: Run, store: Any, workers: Workers, children: Mapping[int, subprocess.Popen[bytes]]) -> None:
        """`children` are the workers that this process has started, by rank."""
        self._run, self._store, self._workers, self._children = run, store, workers, children
        self._others = [rank for rank in range(workers.count) if rank != workers.rank]
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(self._others, ("", time.monotonic()))
        self._lost, self._error, self._done = "", "", threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch-workers", daemon=True)

    def __enter__(self) -> Watch:
        self._store.set(f"host/{self._workers.rank}", f"process {os.getpid()} on {platform.node()}")
        self._store.set(f"alive/{self._workers.rank}", "0")
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                return
            if of_exchange(error) and (sentence := self._wait_for_the_cause()):
                raise WorkerLostError(sentence) from None
            self._error = f"{type(error).__name__}: {printable(shorten(str(error), 1500))}"
            with suppress(Exception):  # the store may be gone
                self._store.set(f"error/{self._workers.rank}", self._error)
            leave_group()  # still watched, since nccl may wait here for the others, which now end
        finally:
            self._done.set()

    def _wait_for_the_cause(self) -> str:
        deadline = time.monotonic() + 2 * SILENT_SECONDS
        while not self._lost and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._lost

    def _watch(self) -> None:
        count, began = 0, time.monotonic()
        store: Any = None
        while not self._lost and not self._done.wait(1.0):
            count += 1
            try:
                store = store or self._store.clone()  # a connection of its own, since the other one may be waiting
                store.set(f"alive/{self._workers.rank}", str(count))
                found = (self._state_of(store, rank, began) for rank in self._others)
                self._lost = next(filter(None, found), "")
            except Exception:  # the store, which the first worker hosts, is gone
                self._lost = f"worker 0 of {self._workers.count} cannot be reached any more"
        if not self._done.wait(GRACE_SECONDS):
            self._end()

    def _state_of(self, store: Any, rank: int, began: float) -> str:
        """Returns what has happened to a worker; nothing if it is well."""
        name = f"worker {rank} of {self._workers.count}"
        if store.check([f"host/{rank}"]):
            name += f" ({store.get(f'host/{rank}').decode()})"
        if store.check([f"error/{rank}"]):
            return f"{name} failed: {store.get(f'error/{rank}').decode()}"
        child = self._children.get(rank)
        if child is not None and child.poll() is not None:
            code = child.returncode
            how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit status {code}"
            return f"{name} {how}"
        now, before = time.monotonic(), self._heard[rank]
        if not store.check([f"alive/{rank}"]):
            return f"{name} has not started within {JOIN_SECONDS:g} s" if now - began > JOIN_SECONDS else ""
        if (report := store.get(f"alive/{rank}").decode()) != before[0]:
            self._heard[rank] = report, now
        elif now - before[1] > SILENT_SECONDS:
            return f"{name} was lost: it has not reported for {SILENT_SECONDS:g} s"
        return ""

    def _end(self) -> None:
        """Ends this process, whose main thread may wait for the lost worker; the first one writes the run's status."""
        error = self._error or f"{WorkerLostError.__name__}: {self._lost}"
        print(error, file=sys.stderr, flush=True)
        try:
            if self._workers.first:
                write_status(self._run, "failed", error=error)
        finally:
            for child in self._children.values():
                child.kill()
            leave(1)


def leave_group() -> None:
    """Leaves torch's default process group, if this process has joined it."""
    if dist.is_initialized():
        dist.destroy_process_group()
