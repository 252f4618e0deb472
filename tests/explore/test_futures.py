"""What is derived from futures: the time at which it completes, and its error."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from refine_lab.explore.futures import ending


def test_who_waits_for_an_ending_sees_what_it_has_done() -> None:
    asked: Future[int] = Future()
    entered, released, seen = threading.Event(), threading.Event(), []

    def end(future: Future[int]) -> None:
        entered.set()
        assert released.wait(60)
        seen.append(future.result())

    ended = ending(asked, end)
    threading.Thread(target=asked.set_result, args=(3,)).start()
    assert entered.wait(60) and asked.done() and not ended.done()
    released.set()
    assert ended.result(60) == 3 and seen == [3]


@pytest.mark.parametrize("fails", ["future", "call"])
def test_an_ending_raises_the_error_of_the_future_or_of_the_call(fails: str) -> None:
    asked: Future[Any] = Future()
    called = []

    def end(future: Future[Any]) -> None:
        called.append(future)
        if fails == "call":
            raise ValueError("an error of the call")

    ended = ending(asked, end)
    if fails == "future":
        asked.set_exception(ValueError("an error of the future"))
    else:
        asked.set_result(None)
    assert called == [asked] and str(ended.exception(60)) == f"an error of the {fails}"
