"""The long-short difference of a document with planted facts, in the token map and below the states, in Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_lab.explore.client import Worker
from widgets.reward_explorer import RewardExplorer
from widgets.state_view import StateView

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser
NAME = "Long-short difference"


@pytest.fixture(scope="module")
def explored() -> Iterator[tuple[RewardExplorer, StateView]]:
    worker = Worker("cpu")
    explorer = RewardExplorer(worker=worker, settings={"group_size": 2})
    explorer.shown.result(300)
    states = explorer.state_view()
    states.shown.result(300)
    yield explorer, states
    worker.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_chosen_read_and_drawn(browser: Any, explored: Any, scheme: str, tmp_path: Path) -> None:
    explorer, states = explored
    values = explorer.token_map.metrics["long_short"].values
    top = int(np.nanargmax(values))
    assert np.isnan(values[:256]).all() and values[top] > 3, "the model needs its memory for the answer to the question"
    with faultless_page(browser, viewport={"width": 1100, "height": 1000}, color_scheme=scheme) as page:
        page.goto(explorer.save_html(tmp_path / "page.html", more=[states]).as_uri())
        text = page.locator(".token-map")
        text.get_by_label("Colour by").select_option(label=NAME)
        settle(page)
        assert text.locator(".legend .title").inner_text() == f"{NAME} nats"
        text.get_by_role("button", name="Next highest").click()
        settle(page)
        status = text.locator(".status").inner_text()
        assert f"{NAME} {values[top]:.3g}"[: len(NAME) + 4] in status, status

        below = page.locator(".state-view")
        assert "layer 0, head 0" in below.locator(".title").inner_text()
        below.get_by_role("combobox", name="Bars").select_option(label=f"{NAME} (nats)")
        settle(page)
        said = below.locator(".title").inner_text()
        assert said.startswith(f"{NAME} of every token in nats") and said.endswith("largest:")
        assert f"token {top:,}: " in below.locator(".strongest li").first.inner_text()
        below.locator(".strongest button").first.click()
        settle(page)
        assert "after token" in below.locator(".status").inner_text()
        if folder := os.environ.get("REFINE_SHOTS"):
            for part, name in ((text, "token-map"), (below, "state-view")):
                part.screenshot(path=Path(folder) / f"long-short-{name}-{scheme}.png")


def test_a_short_document_offers_only_write_strengths(browser: Any, tmp_path: Path) -> None:
    from tests.factories.state_view import summary
    from widgets.core.page import save_page

    with faultless_page(browser) as page:
        page.goto(save_page(tmp_path / "page.html", StateView(summary(), str)).as_uri())
        page.locator(".state-view .title").filter(has_text="does not report").wait_for()
        assert page.locator(".state-view").get_by_role("combobox", name="Bars", include_hidden=True).is_hidden()
