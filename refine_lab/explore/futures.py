"""Combines futures; an error in one becomes the error of every future derived from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any


class RequestCancelled(Exception):
    """The request has been cancelled, so nothing follows from its result."""


def finished(result: Any) -> Future[Any]:
    """Returns a future with the given result."""
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def then(function: Callable[..., Any], *futures: Future[Any]) -> Future[Any]:
    """Returns the future of `function(*results)`, complete when all `futures` are; it raises the first error, if any."""
    following: Future[Any] = Future()
    completed = count(1)  # `next` is atomic, so exactly one of several threads counts the last future

    def done(_: Any) -> None:
        if next(completed) < len(futures):
            return
        try:
            following.set_result(function(*(future.result() for future in futures)))
        except Exception as error:  # the future raises it
            following.set_exception(error)

    for future in futures or (finished(None),):
        future.add_done_callback(done)
    return following


def ending(future: Future[Any], call: Callable[[Future[Any]], Any]) -> Future[Any]:
    """Returns a future with the outcome of `future`, complete once `call(future)` has returned.

    After `future.add_done_callback(call)`, in contrast, a thread that waits for `future` may go on before `call`.
    """
    following: Future[Any] = Future()

    def done(_: Any) -> None:
        try:
            call(future)
            following.set_result(future.result())
        except Exception as error:  # the future raises it
            following.set_exception(error)

    future.add_done_callback(done)
    return following


def together(futures: Sequence[Future[Any]]) -> Future[list[Any]]:
    """Returns the future of the results of futures, in order."""
    return then(lambda *results: [*results], *futures)
