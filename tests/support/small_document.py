"""A small document and a worker for the tests of the panels; they are imported as fixtures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from refine_lab.explore.client import Worker

TEXT = "def area(width, height):\n    return width * height\n\n" * 12
SECONDS = 120


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker("cpu")
    yield worker
    worker.close()


def wait_for(done: Callable[[], bool]) -> None:
    """Waits until `done` returns True, at most `SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
