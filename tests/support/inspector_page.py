"""The rollout inspector in a page of its own in Chromium, and the rollouts that its tests show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.rollout_frames import WORDS, rows
from widgets.rollout_inspector import RolloutInspector

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")


from tests.support.lab import FLAGS, faults, settle  # noqa: E402


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
    """A page with its faults."""

    page: playwright.Page
    folder: Path
    faults: list[str]

    def open(self, widget: RolloutInspector) -> playwright.Page:
        path = widget.save_html(self.folder / "rollouts.html")
        self.page.goto(path.as_uri())
        self.page.locator(".rollout-inspector .detail *").first.wait_for(state="attached")
        self.settle()
        return self.page

    def settle(self) -> None:
        settle(self.page)

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
    """Opens windows; in the end, no page has had a fault."""
    made: list[Window] = []

    def make(scheme: str = "light", width: int = 1300) -> Window:
        page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        window = Window(page=page, folder=tmp_path, faults=faults(page))
        made.append(window)
        return window

    yield make
    for window in made:
        window.page.close()
        assert window.faults == []


@pytest.fixture
def window(new_window: Callable[..., Window]) -> Window:
    return new_window()


def take_shot(window: Window, name: str) -> None:
    """A picture, where REFINE_SHOTS names a folder."""
    if folder := os.environ.get("REFINE_SHOTS"):
        window.page.screenshot(path=f"{folder}/rollouts_{name}.png", full_page=True)
