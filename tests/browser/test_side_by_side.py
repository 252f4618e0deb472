"""Two models side by side in a page without Python: a token chosen in the map shows what both models expected there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.rollout_pairs import pair_rollouts
from refine_lab.explore.side_by_side import ReadingPair
from widgets.core.page import save_page
from widgets.parts.likely_tokens import LikelyTokens
from widgets.parts.measure_table import measure_table
from widgets.parts.pair_metrics import pair_metrics
from widgets.parts.rollout_pairs import RolloutPairs
from widgets.parts.text_tables import TextTables
from widgets.token_map import TokenMap, TokenText

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser
WORDS = ["The", " quick", " <b>brown", " fox", " jumps", " over"]


def string(ids: Any) -> str:
    return WORDS[ids[0]]


def reading(logprobs: list[float], likely: list[int], probabilities: list[float]) -> DocumentReading:
    count = len(WORDS)
    return DocumentReading(
        token_ids=np.arange(count, dtype=np.int32),
        entropies=np.full(count, 1.0),
        logprobs=np.array([np.nan, *logprobs]),
        ranks=np.arange(count, dtype=np.int32),
        alternatives=np.tile(np.array(likely, dtype=np.int32), (count, 1)),
        probabilities=np.tile(np.array(probabilities, dtype=np.float32), (count, 1)),
    )


def recorded(rollout: list[int]) -> pd.DataFrame:
    row = {
        "step": 0,
        "sequence_id": 0,
        "position": 2,
        "sample_index": 0,
        "prefix_ids": [0, 1, 2],
        "target_ids": [3, 4, 5],
    }
    return pd.DataFrame([row | {"rollout_ids": rollout, "logprobs": [-1.0] * 3, "reward": 0.5, "binary": 1 / 3}])


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 480)])
def test_a_chosen_token_is_shown_under_both(browser: Any, scheme: str, width: int, tmp_path: Path) -> None:
    a = reading([-1.0, -2.0, -3.0, -4.0, -1.0], [3, 4, 5], [0.5, 0.2, 0.1])
    b = reading([-1.0, -1.0, -2.5, -4.0, -1.5], [3, 2, 4], [0.6, 0.2, 0.1])
    pair = ReadingPair(token_ids=a.token_ids, a=a, b=b, key_tokens=np.arange(6) == 3, key_model="A")
    offsets = np.cumsum([0, *map(len, WORDS)])
    tokens, likely, pairs = (
        TokenMap(TokenText("".join(WORDS), offsets), pair_metrics(pair)),
        LikelyTokens(),
        RolloutPairs(),
    )
    likely.show(pair, string, ["one", "other"])
    pairs.show(pair_rollouts(recorded([3, 0, 5]), recorded([3, 1, 1])), string, "Rollouts before token 3")
    table = TextTables.of([measure_table(pair, "A = one and B = other")])
    path = save_page(
        tmp_path / "page.html", table, tokens, likely, pairs, links=[(tokens, "selected", likely, "selected")]
    )
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
