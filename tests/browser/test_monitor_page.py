"""The monitor's offline page in Chromium: the tables of result cards and settings are text that can be read and reached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from refine_lab.runs.cards import write_card
from tests.factories.run_monitor import HOSTILE, card_with, write_run
from tests.support.readable import nameless, unreadable
from widgets.run_monitor import RunMonitor

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The page of two runs, one of which was evaluated twice."""
    runs = [write_run(tmp_path / "runs", seed) for seed in (0, 1)]
    for name, value in (("first", 0.25), ("second", 0.5)):
        write_card(runs[0].path, tmp_path / "results" / name, card_with(value))
    monitor = RunMonitor(tmp_path / "runs")
    try:
        return monitor.save_html(tmp_path / "page.html")
    finally:
        monitor.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_result_cards_stand_on_the_page(scheme: str, path: Path, browser: Any) -> None:
    with faultless_page(browser, viewport={"width": 1000, "height": 1400}, color_scheme=scheme) as page:
        page.goto(path.as_uri())
        tables = page.locator(".text-tables table")
        tables.first.wait_for()
        settle(page)
        captions = ["Differing settings", "Evaluations", "Settings that all selected runs share"]
        assert tables.locator("caption").all_inner_texts() == captions
        cells = (
            tables.nth(1)
            .locator("tbody tr")
            .evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
        )
        assert [row[6] for row in cells] == [
            "0.2500 ± 0.0625",
            f"not measured: {HOSTILE}",
            "0.5000 ± 0.0625",
            f"not measured: {HOSTILE}",
        ]
        assert {len(row) for row in cells} == {tables.nth(1).locator("th").count()} == {10}
        assert page.locator(".text-tables img").count() == 0
        assert nameless(page, ".text-tables") == [] and unreadable(page, ".text-tables") == {}
        regions = page.locator(".text-tables [role=region]")
        regions.nth(1).focus()
        assert regions.nth(1).evaluate("node => node === document.activeElement")
        if folder := os.environ.get("REFINE_SHOTS"):
            page.screenshot(path=f"{folder}/monitor_page_{scheme}.png")
