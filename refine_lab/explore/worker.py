"""The resident process that holds the models: `python -m refine_lab.explore.worker FD DEVICE`, started by `client`.

It reads requests from the socket FD and answers them in order. A generator method (`Session.adapt`) is a job whose
steps are reported; only one runs at a time, and other requests are served between its steps. The process ends when the
other side does.

A request with a `version`, that of a reading, is refused if the model's weights have changed since.

    to it      ("call", id, method, arguments)    ("stop", id)    ("cancel", id)
    from it    ("step", id, value)    ("result", id, value)    ("error", id, type, message)

A stopped job ends with the result None after its current step. A cancelled call is not begun, or ends before the next token
of its rollouts or the next module of a model's forward or backward pass; its result is None.
"""

from __future__ import annotations

import pickle
import queue
import sys
import threading
from collections.abc import Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from types import GeneratorType
from typing import Any

METHODS = (
    *("open", "read", "rollouts", "answer", "measure", "adapt", "reset", "keep", "save", "as_loaded", "fingerprint"),
    *("forget", "states", "predict", "attribute", "erase", "lens", "counterfactual", "save_state"),
)


def send(connection: Connection, message: tuple[Any, ...]) -> None:
    """Sends one message, pickled as bytes, so that the processes share no memory."""
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


class Cancelled(Exception):
    """The call in progress has been cancelled."""


class RequestLoop:
    """Serves a session's requests."""

    def __init__(self, connection: Connection, session: Any) -> None:
        self.connection, self.session = connection, session
        self.requests: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
        self.job: tuple[int, Generator[Any]] | None = None
        self.current: int | None = None
        self.cancelled: set[int] = set()
        session.between = self.check

    def listen(self) -> None:
        """Puts every request into the queue, and None at the end of the stream. A cancellation takes effect at once."""
        with suppress(EOFError, OSError):
            while True:
                request = self.connection.recv()
                if request[0] == "cancel":
                    self.cancelled.add(request[1])
                self.requests.put(request)
        self.requests.put(None)

    def check(self) -> None:
        """Raises Cancelled if the call in progress has been cancelled."""
        if self.current in self.cancelled:
            raise Cancelled

    def run(self) -> None:
        threading.Thread(target=self.listen, name="requests", daemon=True).start()
        while True:
            try:
                request = self.requests.get(block=self.job is None)
            except queue.Empty:
                self.advance()
                continue
            if request is None:
                return
            kind, *arguments = request
            {"stop": self.stop, "call": self.call, "cancel": self.cancelled.discard}[kind](*arguments)

    def call(self, number: int, method: str, arguments: dict[str, Any]) -> None:
        self.current = number
        try:
            self.check()
            if method not in METHODS:
                raise ValueError(f"a session has no method {method!r}")
            if version := arguments.pop("version", None):
                self.session.expect(arguments["model"], version)
            with self.session.interruptible():
                value = getattr(self.session, method)(**arguments)
            if isinstance(value, GeneratorType):
                if self.job is not None:
                    raise ValueError("a model is being adapted already: stop the adaptation first")
                self.job = number, value
                return
        except Cancelled:
            send(self.connection, ("result", number, None))
        except Exception as error:
            self.refuse(number, error)
        else:
            send(self.connection, ("result", number, value))
        finally:
            self.current = None

    def advance(self) -> None:
        """Runs the job's next step."""
        assert self.job is not None
        number, steps = self.job
        try:
            send(self.connection, ("step", number, next(steps)))
        except StopIteration:
            self.job = None
            send(self.connection, ("result", number, None))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            self.job = None
            self.refuse(number, error)

    def stop(self, number: int) -> None:
        """Ends the job with that number, if it is still running."""
        if self.job is not None and self.job[0] == number:
            self.job[1].close()
            self.job = None
            send(self.connection, ("result", number, None))

    def refuse(self, number: int, error: Exception) -> None:
        if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            self.session.forget()
        send(self.connection, ("error", number, type(error).__name__, str(error)))


def main(arguments: list[str]) -> None:
    from transformers.utils import logging  # loads torch, as the next does: not when a client imports this file

    from refine_lab.explore.session import Session

    logging.disable_progress_bar()  # the last line of the output explains the death of a worker
    descriptor, device = arguments
    with suppress(BrokenPipeError, ConnectionResetError):  # the client has ended
        RequestLoop(Connection(int(descriptor)), Session(device)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
