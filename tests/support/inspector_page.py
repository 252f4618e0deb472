"""The rollout inspector in a page of its own in Chromium, and the rollouts that its tests show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.rollout_frames import WORDS, rows
from widgets.rollout_inspector import RolloutInspector

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")


FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
PATIENCE = 60_000
"Milliseconds: busy cores draw slowly."


def three_positions() -> pd.DataFrame:
    """Rewards 0.00 to 0.75 at the first position, 1.00 to 1.75 and 2.00 to 2.75 at the others; cosines a token."""
    groups = [
        rows([0, 1, 2], [0, 4, 5], [3, 3], [1, 0, 2]),
        rows([6], [7], [8], [9]),
        rows([1], [2], [3], [4], target=[1]),
    ]
    for number, group in enumerate(groups):
        group["step"], group["position"], group["entropy"] = number + 1, 40 - number, float(number)
        group["reward"] += number
        group["advantage"] = [-1.5, -0.5, 0.5, 1.5]
        group["cosines"] = [[0.5, -0.25, 1.0][: len(ids)] for ids in group["rollout_ids"]]
    return pd.concat(groups, ignore_index=True)


def many(count: int, size: int) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    group = np.arange(count) // size
    targets = draw.integers(0, len(WORDS), (group[-1] + 1, 5))
    frame = rows(*draw.integers(0, len(WORDS), (count, 5)))
    return frame.assign(
        step=group // 100,
        sequence_id=group,
        target_ids=[*targets[group]],
        reward=draw.normal(size=count),
        sample_index=np.arange(count) % size,
    )


@dataclass(kw_only=True)
class Window:
    """A page and what it did wrong."""

    page: playwright.Page
    folder: Path
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def open(self, widget: RolloutInspector) -> playwright.Page:
        path = widget.save_html(self.folder / "rollouts.html")
        self.page.goto(path.as_uri())
        self.page.locator(".rollout-inspector .detail *").first.wait_for(state="attached")
        self.settle()
        return self.page

    def settle(self) -> None:
        """Wait until what was asked for is painted."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def fill(self, name: str, value: str) -> None:
        self.page.locator(f"[data-filter='{name}']").fill(value)
        self.settle()

    def sort(self, column: str) -> None:
        self.page.locator(f"[data-column='{column}']").click()
        self.settle()

    def shown(self) -> list[int]:
        """Rows of the frame in the order they are painted in."""
        found = self.page.locator(".rollout").evaluate_all(
            "nodes => nodes.map((node) => [parseFloat(node.style.top), Number(node.dataset.row)])"
        )
        return [row for _, row in sorted(found)]

    def selected(self) -> int:
        found = self.page.locator(".rollout.selected").evaluate_all(
            "nodes => nodes.map((node) => Number(node.dataset.row))"
        )
        return found[0] if found else -1

    def status(self) -> str:
        return self.page.locator(".status").inner_text()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def new_window(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Window]]:
    """Opens windows; in the end none of them had an error or asked for anything."""
    made: list[Window] = []

    def make(scheme: str = "light", width: int = 1300) -> Window:
        page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        window = Window(page=page, folder=tmp_path)
        page.on("pageerror", lambda error: window.errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and window.errors.append(said.text))
        page.on("request", lambda asked: asked.url.startswith(("file:", "blob:")) or window.foreign.append(asked.url))
        made.append(window)
        return window

    yield make
    for window in made:
        window.page.close()
        assert (window.errors, window.foreign) == ([], [])


@pytest.fixture
def window(new_window: Callable[..., Window]) -> Window:
    return new_window()


def take_shot(window: Window, name: str) -> None:
    """A picture, where REFINE_SHOTS names a folder."""
    if folder := os.environ.get("REFINE_SHOTS"):
        window.page.screenshot(path=f"{folder}/rollouts_{name}.png", full_page=True)
