"""What every test starts from: one thread, one seed, no network; and the fixtures that several files share.

Shapes and types of `refine_lab` are checked while testing: `--jaxtyping-packages` in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

LARGER_TIERS = ("notebook", "browser", "process", "gpu", "slow", "soak", "triton_interpreter")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# One thread: sums are added in the same order on every machine, and the recorded values hold.
torch.set_num_threads(1)
# The jobs that a shell puts in the background ignore interrupts, and so do their children: here they come as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Same initial weights and inputs in every run, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_handler() -> Iterator[None]:
    """A test leaves the handler of interrupts as it was, so that the next one can be interrupted."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    left = signal.signal(signal.SIGINT, handler)
    assert left is handler, f"the test leaves {left!r} as the handler of interrupts"


@pytest.fixture(autouse=True)
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the fast tier fails where it connects to another machine."""
    if any(request.node.get_closest_marker(tier) for tier in LARGER_TIERS):
        return
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            pytest.fail(f"a test of the fast tier connects to {address[0]}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect_here)


def _missing(what: str) -> None:
    """Skip, or fail in continuous integration, where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI is true")
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `../shared/data` beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        _missing("the folder shared/data is not beside the checkout")
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """Chromium's executable: the environment's CHROMIUM, or the one on the path."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not found:
        _missing("no Chromium: install it, or name it in CHROMIUM")
    return str(found)
