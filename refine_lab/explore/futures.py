"""Combines futures; an error in one becomes the error of every future derived from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


def finished(result: Any) -> Future[Any]:
    """Returns a future with the given result."""
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def then(future: Future[Any], function: Callable[[Any], Any]) -> Future[Any]:
    """Returns the future of `function(result)`."""
    following: Future[Any] = Future()

    def done(asked: Future[Any]) -> None:
        try:
            following.set_result(function(asked.result()))
        except Exception as error:  # it is the future that raises it
            following.set_exception(error)

    future.add_done_callback(done)
    return following


def together(futures: Sequence[Future[Any]]) -> Future[list[Any]]:
    """Returns the future of all results in order, complete when all are; it raises the first error, if any."""
    gathered: Future[list[Any]] = Future()
    left, lock = len(futures), threading.Lock()

    def done(_: Any) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            try:
                gathered.set_result([future.result() for future in futures])
            except Exception as error:  # it is the future that raises it
                gathered.set_exception(error)

    for future in futures:
        future.add_done_callback(done)
    return gathered if futures else finished([])
