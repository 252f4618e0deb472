"""Saved pages in Chromium, whole: what they say without Python, on a narrow screen, in another theme, and what axe finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from refine_lab.explore.client import Worker
from tests.factories.run_monitor import write_run
from tests.support.readable import unreadable, violations
from widgets.figures.tables import Table
from widgets.reward_explorer import RewardExplorer
from widgets.run_monitor import RunMonitor

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser

HEAD = (
    "() => Object.fromEntries([...document.querySelectorAll('header dl > div')].map((n) => n.innerText.split('\\n')))"
)
LABELS = """() => [...document.querySelector('.state-view canvas').getContext('2d').getImageData(2, 2, 140, 28).data]
    .filter((_, i) => i % 4 !== 3).reduce((sum, value) => sum + value, 0)"""
CUT = """() => [...document.querySelectorAll('.rollout .token')].filter((token) => token.getBoundingClientRect().right
    > token.closest('.rollout').querySelector('.numbers').getBoundingClientRect().left + 1).length"""
LINES = "() => [...document.querySelectorAll('.line')].map((line) => line.style.top)"
HIDDEN_FOR_A_FRAME = """() => new Promise((done) => {
    const main = document.querySelector('main');
    document.querySelector('.scroller').dispatchEvent(new Event('scroll'));
    main.style.display = 'none';
    requestAnimationFrame(() => { main.style.display = ''; setTimeout(done, 100); }); })"""


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page of an explorer with its states: 16 rollouts at 8 sampled positions."""
    worker = Worker("cpu")
    explorer = RewardExplorer(worker=worker, settings={"group_size": 2})
    explorer.shown.result(300)
    states = explorer.state_view()
    states.shown.result(300)
    yield explorer.save_html(tmp_path_factory.mktemp("page") / "page.html", more=[states])
    worker.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_explorers_page_alone(scheme: str, explored: Path, browser: Any) -> None:
    with faultless_page(browser, viewport={"width": 1440, "height": 900}, color_scheme=scheme) as page:
        page.goto(explored.as_uri())
        page.locator(".state-view canvas").first.wait_for()
        settle(page)
        assert page.locator("h1").inner_text() == "Reward explorer"
        said = page.locator(".conclusion").inner_text()
        assert re.match(r"16 rollouts at 8 sampled positions have a mean cosine reward of 0\.\d{3} and an exact", said)
        head = page.evaluate(HEAD)
        assert (head["model"], head["reward"], head["seed"]) == ("tiny-deltanet", "cosine", "0") and head["Saved"]
        assert violations(page) == [] and unreadable(page, "body") == {}
        lines = page.evaluate(LINES)
        assert len(lines) > 15
        page.evaluate(HIDDEN_FOR_A_FRAME)  # as JupyterLab does when its theme changes
        assert page.evaluate(LINES) == lines
        before = page.evaluate(LABELS)
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        settle(page)
        assert page.evaluate(LABELS) != before, "the labels are drawn again in the other theme's colour"
        assert unreadable(page, "body") == {}


def test_it_is_read_at_480_pixels_and_a_click_is_answered(explored: Path, browser: Any) -> None:
    with faultless_page(browser, viewport={"width": 480, "height": 900}) as page:
        page.goto(explored.as_uri())
        page.locator(".rollout").first.wait_for()
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 480
        assert page.evaluate(CUT) == 0
        tokens = page.locator(".token-map canvas.text")
        tokens.focus()
        for key in ("ArrowRight", "ArrowRight", "Enter"):
            tokens.press(key)
        said = page.locator(".token-map .status")
        alone = r"Token \d: this saved page has no rollouts there, only those of the positions marked ◆\."
        assert re.fullmatch(alone, said.inner_text())
        listed = page.locator(".rollout-inspector .status")
        assert listed.inner_text() == "16 rollouts at 8 positions"
        while "sampled position" not in said.inner_text():
            tokens.press("ArrowRight")
        tokens.press("Enter")
        settle(page)
        assert re.fullmatch(r"Token \d+: 2 rollouts, in the list below\.", said.inner_text())
        assert listed.inner_text() == "2 of 16 rollouts at 1 position"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_monitors_page_has_answers_and_settings(scheme: str, tmp_path: Path, browser: Any) -> None:
    write_run(tmp_path / "runs", 0)
    monitor = RunMonitor(tmp_path / "runs")
    answers = Table(pd.DataFrame({"question": ["which?"], "SFT": ["one"], "REFINE": ["two"]}), "Answers side by side")
    path = monitor.save_html(tmp_path / "page.html", "Post-training", more=[answers], conclusion="REFINE is better.")
    monitor.close()
    with faultless_page(browser, viewport={"width": 480, "height": 900}, color_scheme=scheme) as page:
        page.goto(path.as_uri())
        page.locator(".rollout").first.wait_for()
        settle(page)
        assert page.locator("h1").inner_text() == "Post-training"
        assert page.locator(".conclusion").inner_text() == "REFINE is better."
        assert page.evaluate(HEAD)["methods"] == "REFINE"
        captions = page.locator(".text-tables caption").all_inner_texts()
        assert captions == ["Answers side by side", "Settings that all selected runs share"]
        assert page.evaluate("document.documentElement.scrollWidth") == 480
        assert violations(page) == [] and unreadable(page, "body") == {}
