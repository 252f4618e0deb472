"""The notebook's connection to the worker: calls return futures, so that the kernel stays responsive."""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from refine_lab.explore.worker import send
from refine_lab.runs.process import PYTHON, spawn
from refine_lab.text import signal_name

_PASSED_ON = (ValueError, FileNotFoundError, TypeError, MemoryError, FloatingPointError)
ERRORS: Mapping[str, type[Exception]] = {error.__name__: error for error in _PASSED_ON} | {"ConfigError": ValueError}
"""Error types that are passed on (of a ConfigError only the message); any other error becomes a RuntimeError."""


RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")
"""Beginning of the last line of a traceback."""


class WorkerDied(RuntimeError):
    """The worker ended before it answered; the next call starts another."""


class Worker:
    """A process that holds models and documents (see `session.Session`), started by the first call and restarted if it dies.

    `submit` returns at once. If a worker dies, pending requests and adapted weights are lost: the models are loaded
    again in their original state. Futures complete while the lock is free, since their callbacks may wait for a thread
    that calls the worker.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log: Any = None
        self._numbers = count()
        self._waiting: dict[int, tuple[Future[Any], Callable[[Any], object] | None]] = {}
        self._listener: threading.Thread | None = None
        self.death_observers: set[Callable[[Worker, str], object]] = set()
        "Functions that are called with this worker and a sentence whenever its process has ended, after the futures raise."
        atexit.register(self._exit)

    @property
    def pid(self) -> int | None:
        """Returns the id of the process, or None if none is alive."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def submit(self, method: str, on_step: Callable[[Any], object] | None = None, **arguments: Any) -> Future[Any]:
        """Requests a method of `Session`; the future returns its result or raises its error.

        `on_step` is called with every step of a generator method, on the listener thread. `stop` ends such a job.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self.pid is None:
                self._lost_in_call()  # its listener may be in a callback still
                self._start()
            number = next(self._numbers)
            future.set_running_or_notify_cancel()  # cannot be cancelled, since the worker executes it
            self._waiting[number] = future, on_step
            self._send("call", number, method, arguments)
        return future

    def call(self, method: str, on_step: Callable[[Any], object] | None = None, **arguments: Any) -> Any:
        """Requests a method, as `submit`, and waits for the result."""
        return self.submit(method, on_step, **arguments).result()

    def stop(self, future: Future[Any]) -> None:
        """Ends the job of the future after its current step; its result is then None."""
        with self._lock:
            for number in [number for number, (waiting, _) in self._waiting.items() if waiting is future]:
                self._send("stop", number)

    def cancel(self, future: Future[Any]) -> None:
        """Cancels the future's call; its result is then None.

        The call is not begun, or ends before its next token or the next module of a model, unless it is just ending.
        """
        with self._lock:
            for number in [number for number, (waiting, _) in self._waiting.items() if waiting is future]:
                self._send("cancel", number)

    def stop_steps(self) -> int:
        """Ends all jobs that report steps, each after its current one; returns their number."""
        with self._lock:
            making = [future for future, on_step in self._waiting.values() if on_step is not None]
        for future in making:
            self.stop(future)
        return len(making)

    def close(self) -> None:
        """Ends the process; pending requests raise WorkerDied. A later call starts another process."""
        with self._lock:
            process, listener, connection = self._process, self._listener, self._connection
        if process is None or listener is None or connection is None:
            return
        process.terminate()  # the listener reads the end of the stream and ends the pending futures
        process.wait(10)
        if listener is not threading.current_thread():
            listener.join(10)
        connection.close()

    def _exit(self) -> None:
        """Ends the process with the kernel, when there is no one left to tell."""
        self.death_observers.clear()
        self.close()

    def _send(self, *message: Any) -> None:
        """Sends a message; if the worker has died, its pending futures raise."""
        if self._connection is not None:
            try:
                send(self._connection, message)
            except OSError:
                self._lost_in_call()

    def _start(self) -> None:
        self._connection, remote = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - holds the output of the process while it runs
        command = [*PYTHON, "refine_lab.explore.worker", str(remote.fileno()), self.device]
        # Threads that spin while they wait slow a step a hundredfold beside any other busy process (docs/log.md).
        policy = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        self._process = spawn(command, self._log, inherit=[remote.fileno()], environ=policy)
        remote.close()
        arguments = (self._connection,)
        self._listener = threading.Thread(target=self._listen, args=arguments, name="worker-listener", daemon=True)
        self._listener.start()

    def _listen(self, connection: Connection) -> None:
        while True:
            try:
                message = connection.recv()
            except Exception:  # the end of the stream, an error of the socket, or a result that cannot be unpickled
                break
            self._receive(*message)
        with self._lock:
            raise_in_all = self._lost() if connection is self._connection else None
        if raise_in_all is not None:
            raise_in_all()

    def _receive(self, kind: str, number: int, value: Any, text: str = "") -> None:
        with self._lock:
            future, on_step = self._waiting.get(number, (None, None))
            if kind != "step":
                self._waiting.pop(number, None)
        if future is None:
            return
        if kind == "step":
            try:
                if on_step is not None:
                    on_step(value)
            except Exception as error:  # the future raises it, once
                self.stop(future)
                with self._lock:
                    waiting = self._waiting.pop(number, None)
                if waiting is not None:  # otherwise the worker has died, and the future raises that
                    future.set_exception(error)
        elif kind == "result":
            future.set_result(value)
        else:
            future.set_exception(ERRORS[value](text) if value in ERRORS else RuntimeError(f"{value}: {text}"))

    def _lost_in_call(self) -> None:
        """Raises WorkerDied in all pending futures, on another thread, since this one may hold locks of their callbacks."""
        raise_in_all = self._lost()
        if raise_in_all is not None:
            threading.Thread(target=raise_in_all, name="worker-lost", daemon=True).start()

    def _lost(self) -> Callable[[], None] | None:
        """Forgets a process that has ended; returns a function that raises WorkerDied in its futures and tells observers."""
        process, self._process, self._connection = self._process, None, None
        waiting, self._waiting = self._waiting, {}
        if process is None:
            return None
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
        sentence = f"the worker {_end_of(process.wait())}{self._last_words()}"

        def raise_in_all() -> None:
            for future, _ in waiting.values():
                future.set_exception(WorkerDied(sentence))
            for observer in [*self.death_observers]:
                observer(self, sentence)

        return raise_in_all

    def _last_words(self) -> str:
        with self._log as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
            lines = log.read().decode(errors="replace").strip().splitlines()
        raised = next((line for line in reversed(lines) if RAISED.match(line)), "")  # not the source line of a warning
        return f": {raised}" if raised else ""


def _end_of(status: int) -> str:
    """Describes how a process ended, from its exit status."""
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL), most often because memory ran out"
    return f"was ended by {signal_name(-status)}" if status < 0 else f"ended with status {status}"


_workers: dict[str, Worker] = {}


def shared_worker(device: str = "auto") -> Worker:
    """Returns this kernel's worker for a device; all widgets share it, so that a model is in memory only once."""
    return _workers.setdefault(device, Worker(device))
