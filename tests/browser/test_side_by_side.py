"""Two models side by side in a page without Python: a token chosen in the map shows what both models expected there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories.side_by_side import WORDS, measures, reading_pair, rollout_pairs, string
from widgets.core.page import save_page
from widgets.parts.likely_tokens import LikelyTokens
from widgets.parts.pair_metrics import pair_metrics
from widgets.token_map import TokenMap, TokenText

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 480)])
def test_a_chosen_token_is_shown_under_both(browser: Any, scheme: str, width: int, tmp_path: Path) -> None:
    pair = reading_pair()
    offsets = np.cumsum([0, *map(len, WORDS)])
    tokens, likely = TokenMap(TokenText("".join(WORDS), offsets), pair_metrics(pair)), LikelyTokens()
    likely.show(pair, string, ["one", "other"])
    parts = measures(), tokens, likely, rollout_pairs()
    path = save_page(tmp_path / "page.html", *parts, links=[(tokens, "selected", likely, "selected")])
    with faultless_page(browser, viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        page.goto(path.as_uri())
        shown = page.locator(".likely-tokens")
        shown.get_by_text("Select a token of the document").wait_for()
        assert page.locator(".text-tables td").filter(has_text="× 0.").count() >= 2
        page.locator(".token-map canvas.text").click(position={"x": 20, "y": 10})
        for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        settle(page)
        assert shown.locator("h3").inner_text() == "Token 3, reference ·fox"
        facts = shown.locator(".facts tbody tr").all_inner_texts()
        assert [line.split("\t") for line in facts] == [
            ["log p (nats)", "−3.000", "−2.500", "+0.500"], ["rank", "3", "3", "0"]
        ]  # fmt: skip
        marks = shown.locator(".likely .mark").all_inner_texts()
        assert marks == ["=", "=", "3 in B", "only B", "only A", "2 in A"]
        assert shown.locator(".likely td.changed code").all_inner_texts() == ["·jumps", "·<b>brown", "·over", "·jumps"]
        rolled = page.locator(".rollout-pairs")
        assert rolled.locator("code.first").all_inner_texts() == ["The", "·quick"]
        assert rolled.locator("code.changed").count() == 4 and rolled.locator("code.match").count() == 3
        said = rolled.locator("tbody tr").first.locator(".unseen").all_inner_texts()
        assert [text.strip() for text in said] == [
            "(equals the reference)",
            "(first difference)",
            "(differs, equals the reference)",
        ]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if folder := os.environ.get("REFINE_SHOTS"):
            page.screenshot(path=f"{folder}/side_by_side_{scheme}.png", full_page=True)
