"""The run table in Chromium: order, filter, hidden curves, selection, and all of it by keyboard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refine_lab.config import DataConfig
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter, write_status
from tests.factories.run_monitor import HOSTILE, write_run
from tests.support.readable import nameless, unreadable
from widgets.core.page import save_page
from widgets.parts.live_curves import LiveCurves
from widgets.parts.run_table import RunTable

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser


def write_stopped(folder: Path, like: Run) -> Run:
    """A run of SFT on text with a hostile name, which a person has stopped."""
    config = replace(like.config, refine=None, seed=2, lr=1e-3, data=DataConfig(sources={HOSTILE: 1.0}))
    with RunWriter.create(config, folder) as writer:
        writer.train(1, {"ntp_loss": 9.5, "tokens_per_second": 5.0})
        writer.flush()
    write_status(writer.run, "stopped", error="a stop was requested; saved after step 1")
    return writer.run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder, 0), write_run(folder, 1, lr=1e-2)]
    runs.append(write_stopped(folder, runs[0]))
    table, curves = RunTable(runs), LiveCurves(runs)
    table.selected = [run.name for run in runs[:2]]
    path = save_page(folder / "page.html", table, curves, links=[(table, "hidden", curves, "hidden")])
    curves.close()
    table.close()
    with faultless_page(browser, viewport={"width": 1100, "height": 800}) as shown:
        shown.goto(path.as_uri())
        shown.locator(".run-table tbody tr").first.wait_for()
        settle(shown)
        yield shown


def column(page: Any, heading: str) -> list[str]:
    """The texts of a column, row by row."""
    script = """(table, heading) => {
      const heads = [...table.querySelectorAll('thead th')].map((head) => head.textContent.replace(/ [▲▼]/, ''));
      const rows = [...table.querySelectorAll('tbody tr[data-run]')];
      return rows.map((row) => row.cells[heads.indexOf(heading)].textContent.trim());
    }"""
    settle(page)
    return page.locator(".run-table table").evaluate(script, heading)


def test_states_settings_and_hostile_text(page: Any) -> None:
    assert column(page, "state") == ["finished", "finished", "stopped by you"]
    assert column(page, "method") == ["REFINE", "REFINE", "SFT"]
    assert column(page, "lr") == ["0.0001", "0.01", "0.001"]
    assert page.locator(".run-table .about td").inner_text() == "saved after step 1"
    assert page.locator(".run-table .error:visible, .run-table .bad:visible, .run-table img").count() == 0


def test_order_and_filter(page: Any) -> None:
    head = page.locator(".run-table thead th", has_text="lr")
    for pressed, order, aria in (
        (1, ["0.01", "0.001", "0.0001"], "descending"),
        (2, ["0.0001", "0.001", "0.01"], "ascending"),
        (3, ["0.0001", "0.01", "0.001"], "none"),
    ):
        head.get_by_role("button").click()
        assert (column(page, "lr"), head.get_attribute("aria-sort")) == (order, aria), pressed
    search = page.get_by_label("filter runs by text")
    search.fill("refine S1")
    assert column(page, "seed") == ["1"]
    assert "1 of 3 runs shown" in page.locator(".run-table .count").first.inner_text()
    search.fill("nothing like this")
    assert column(page, "seed") == []
    assert page.locator(".run-table .none").inner_text() == "No run contains these words."
    search.fill("")
    assert len(column(page, "seed")) == 3


def lines(page: Any) -> int:
    settle(page)
    return page.locator(".live-curves svg[data-panel='train:ntp_loss'] path.line").count()


def test_a_hidden_series_by_keyboard(page: Any) -> None:
    """The arrows go from row to row; the button of a run that is not selected cannot be pressed."""
    assert lines(page) == 3
    hide = page.locator(".run-table [data-key=hide]")
    hide.nth(0).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert lines(page) == 2 and hide.nth(1).inner_text() == "show"
    assert hide.nth(1).evaluate("node => node === document.activeElement")
    page.keyboard.press("Enter")
    assert lines(page) == 3 and hide.nth(2).is_disabled()


def test_selection_by_keyboard(page: Any) -> None:
    boxes = page.locator(".run-table [data-key=select]")
    boxes.nth(0).focus()
    for key in ("End", "Space", "Home", "Space"):
        page.keyboard.press(key)
    settle(page)
    assert [boxes.nth(i).is_checked() for i in range(3)] == [False, True, True]
    page.keyboard.press("Control+a")
    settle(page)
    assert all(boxes.nth(i).is_checked() for i in range(3))
    page.get_by_label("group by experiment").uncheck()
    settle(page)
    assert page.locator(".run-table .group").count() == 0
    page.get_by_label("group by experiment").check()


def test_only_the_box_selects_and_method_and_seed_stay_in_view(page: Any) -> None:
    boxes, row = page.locator(".run-table [data-key=select]"), page.locator(".run-table tr[data-run]").first
    before = boxes.nth(0).is_checked()
    row.locator("td.state").click()
    settle(page)
    assert boxes.nth(0).is_checked() == before
    method, seed = row.locator("td.method"), row.locator("td.seed")
    assert row.get_attribute("data-run") in method.get_attribute("title") and "next-token loss" in method.get_attribute(
        "title"
    )
    scrolls, wide = page.locator(".run-table .scrolls"), page.locator(".run-table .wide")
    page.set_viewport_size({"width": 500, "height": 800})
    settle(page)
    assert "scroll the table sideways" in wide.inner_text()  # columns are cut off
    scrolls.evaluate("node => (node.scrollLeft = node.scrollWidth)")
    settle(page)
    assert scrolls.evaluate("node => node.scrollLeft") > 20 and wide.is_hidden()
    left, first, second = (each.bounding_box() for each in (scrolls, method, seed))
    assert abs(first["x"] - left["x"]) < 3 and abs(second["x"] - first["x"] - first["width"]) < 2
    page.set_viewport_size({"width": 1100, "height": 800})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_and_named(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    settle(page)
    assert nameless(page, ".run-table") == [] and unreadable(page, ".run-table") == {}
    if folder := os.environ.get("REFINE_SHOTS"):
        page.screenshot(path=f"{folder}/run_table_{scheme}.png")
