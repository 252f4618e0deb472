"""The panels' offline pages of all hostile documents in Chromium: painted, and nothing in them executed or asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.explored import ADAPTED, explored
from tests.support.hostile import HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser

NAMES = [
    *(name for name, _ in HOSTILE),
    *(f"adapt: {name}" for name in ADAPTED),
]  # of the other panel three: 40 more are slow
COLOURS = """() => { const c = document.querySelector(".token-map canvas.text");
    return new Set(new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer)).size; }"""
FOREIGN = """() => document.querySelectorAll("script:not([type]), img, iframe, a, [onload], [onerror]").length"""


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    """One page for all documents."""
    with faultless_page(browser, viewport={"width": 1000, "height": 900}) as opened:
        yield opened


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_it_and_does_nothing_more(name: str, page: Any, tmp_path: Path) -> None:
    found = explored()[name]
    (tmp_path / "page.html").write_text(found.page, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    page.locator(".token-map[data-painted]").wait_for(state="attached")
    settle(page)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate(FOREIGN) == 0
    assert page.locator("main > section").count() == 4
    if found.raised is not None:
        assert page.locator(".token-map .status").inner_text() == "No document yet."
        return
    assert int(page.locator(".token-map").get_attribute("data-tokens")) >= 5
    assert page.evaluate(COLOURS) > 3  # grounds of several values, and the gutter's signs
    if name in dict(HOSTILE):
        rollouts = page.locator(".rollout-inspector .rollout")
        assert rollouts.count() in (2, 4)
        assert all(rollouts.locator(".token").all_text_contents())
        assert page.locator(".reward-summary .bar").count() >= 1
    else:
        assert page.locator(".live-curves path.mark").count() >= 2


@pytest.mark.parametrize("name", ADAPTED)
def test_a_page_of_states_shows_the_tokens_as_text(name: str, page: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(explored()[f"states: {name}"].page, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    page.locator(".state-view .strongest li").first.wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.evaluate(FOREIGN) == 0


@pytest.mark.parametrize("name", ADAPTED)
def test_pages_of_the_memory_and_of_two_models_show_text_as_text(name: str, page: Any, tmp_path: Path) -> None:
    for kind, own in (("memory", ".memory-result .writes li"), ("side", ".likely-tokens td code")):
        (tmp_path / "page.html").write_text(explored()[f"{kind}: {name}"].page, encoding="utf-8")
        page.goto((tmp_path / "page.html").as_uri())
        page.locator(own).first.wait_for()
        page.locator(".rollout-pairs tbody code").first.wait_for()
        assert page.locator(".rollout-pairs tbody code").count() >= 8
        assert page.evaluate("window.hacked") is None
        assert page.evaluate(FOREIGN) == 0


def test_a_click_in_the_map_shows_the_rollouts_there(page: Any, tmp_path: Path) -> None:
    """A token that is markup, by keyboard alone."""
    (tmp_path / "page.html").write_text(explored()["end of script"].page, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    page.locator(".token-map[data-painted]").wait_for(state="attached")
    page.locator(".token-map canvas.text").focus()
    page.keyboard.press("Control+Home")
    while "sampled position" not in page.locator(".token-map .status").inner_text():
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(30)
    page.keyboard.press("Enter")
    page.locator(".rollout-inspector .status", has_text="2 of 4 rollouts").wait_for()
    assert page.evaluate("window.hacked") is None
