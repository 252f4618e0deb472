"""Every widget's page in Chromium, light, dark and in VS Code: text of contrast 4.5 at least, all reached, named, announced."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from refine_lab.statistics.rest_change import rest_change, rest_difference
from tests.factories.memory_view import memory_grid, memory_result
from tests.factories.run_monitor import HOSTILE as ERROR
from tests.factories.run_monitor import write_run
from tests.factories.side_by_side import likely_tokens, measures, rollout_pairs
from tests.factories.state_view import summary
from tests.support.readable import VSCODE, contrasts, like_vscode, nameless, stops, unreached, unreadable, violations
from tests.support.rollout_frames import decode, rows
from widgets.core.base import Widget
from widgets.core.notice import Notice
from widgets.core.page import save_page
from widgets.parts.answers import Answers
from widgets.parts.likely_tokens import LikelyTokens
from widgets.parts.live_curves import Curves
from widgets.parts.rest_result import RestResult
from widgets.parts.reward_summary import RewardSummary
from widgets.parts.rollout_pairs import RolloutPairs
from widgets.parts.run_table import RunTable
from widgets.parts.step_slider import StepSlider
from widgets.rollout_inspector import RolloutInspector
from widgets.state_view import StateView
from widgets.token_map import Metric, Target, TokenMap, TokenText

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import browser  # noqa: E402, F401
from tests.support.lab import faultless_page, settle  # noqa: E402

pytestmark = pytest.mark.browser


def curves() -> Curves:
    """Six methods, and a run in each state."""
    x, made = np.arange(4, dtype="<f4"), Curves()
    symbols = ("circle", "diamond", "square", "triangle-up", "x", "circle")
    methods = [
        {"method": f"a{i}", "label": f"Method {i}", "symbol": symbol, "look": i} for i, symbol in enumerate(symbols)
    ]
    costs = {"tokens": (96 * x).tobytes(), "seconds": (2 * x).tobytes()}
    lines = [{"method": f"a{i}", "seed": 0, "x": x.tobytes(), "y": (x + i).tobytes(), **costs} for i in range(6)]
    panel = {"title": "Loss", "unit": "nats per token", "marks": True, "lines": lines}
    made.curves = {"methods": methods, "panels": [{"name": name, **panel} for name in ("loss", "entropy")]}
    states = ("running", "finished", "stopped", "failed", "killed", "unreadable", "waiting")
    made.progress = [
        {"name": f"r{i}", "label": f"Run {i}", "state": state, "step": 3, "steps": 9, "error": ERROR if i == 3 else ""}
        | {"tokens_per_second": 5000.0, "seconds_left": 60.0, "note": "mostly noise" if i == 1 else ""}
        for i, state in enumerate(states)
    ]
    made.error = "what went wrong"
    return made


def rewards() -> RewardSummary:
    numbers = np.random.default_rng(0).random((40, 4))
    return RewardSummary(pd.DataFrame(numbers, columns=["reward", "entropy", "binary", "target_logprob"]), "cosine")


def states() -> StateView:
    view = StateView(summary(), lambda token: "" if token % 2 else f"\n{token} ")
    view.row, view.error = 2, "what went wrong"
    return view


def notice() -> Notice:
    said = Notice()
    said.status, said.error = "Reading…", "what went wrong"
    return said


def inspector() -> RolloutInspector:
    frame = pd.concat([rows([0, 1, 2], [0, 4, 5], [3, 3]), rows([6], [7]).assign(position=9)], ignore_index=True)
    widget = RolloutInspector(frame, decode=decode)
    widget.selected, widget.compared = 1, [0, 4]
    return widget


def token_map() -> TokenMap:
    text = TokenText("one two three", [0, 4, 8, 13])
    made = TokenMap(text, [Metric("m", "Entropy", "nats", [0.0, 1.0, 2.0])], targets=[Target(1)], chunk_borders=[2])
    made.selected, made.error = 1, "what went wrong"
    return made


def slider() -> StepSlider:
    made = StepSlider(label="rollouts at step", last=100, value=50)
    made.error = "what went wrong"
    return made


def rest_result() -> RestResult:
    made, losses = RestResult(), np.random.default_rng(0).random((2, 50))
    changes = {"SFT": rest_change(losses[0], losses[1] - 0.5), "REFINE": rest_change(losses[0], losses[1])}
    pairs = [rest_difference("SFT", losses[1] - 0.5, "REFINE", losses[1])]
    made.show(changes, pairs, {"SFT": "sft", "REFINE": "refine"})
    made.error = "what went wrong"
    return made


def answers() -> Answers:
    row = {"label": "before adaptation", "answer": "in the den", "verdict": "wrong", "logprob": "−1.2"}
    return Answers(rows=[row, {"label": "reference", "answer": "the tree"}])


def run_table() -> RunTable:
    """Two runs with another learning rate, one of them selected, and an error."""
    with tempfile.TemporaryDirectory() as folder:
        made = RunTable([write_run(Path(folder), 0), write_run(Path(folder), 1, lr=1e-2)])
        made.close()
    made.selected, made.error = [made.rows[0]["name"]], "what went wrong"
    return made


WIDGETS: dict[str, tuple[Callable[[], Widget], int]] = {
    "curves": (curves, 2),
    "no curves": (Curves, 0),
    "rewards": (rewards, 0),
    "no rewards": (RewardSummary, 0),
    "states": (states, 12),
    "no states": (StateView, 0),
    "notice": (notice, 0),
    "inspector": (inspector, 15),
    "token map": (token_map, 5),
    "answers": (answers, 2),
    "slider": (slider, 1),
    "slider in percent": (partial(StepSlider, label="Held-out remainder", last=90, value=33, unit="%"), 1),
    "result on the remainder": (rest_result, 0),
    "memory grid": (memory_grid, 0),
    "diverging memory grid": (partial(memory_grid, diverging=True), 0),
    "prediction with and without writes": (memory_result, 5),
    "likely tokens": (likely_tokens, 0),
    "no likely tokens": (LikelyTokens, 0),
    "rollouts in pairs": (rollout_pairs, 1),
    "no rollouts in pairs": (RolloutPairs, 0),
    "losses of two models": (measures, 0),
    "run table": (run_table, 5),
    "no steps": (partial(StepSlider, disabled=True), 0),
}
"""How it is made, and of how many things at least a person can act on."""


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    with faultless_page(browser, viewport={"width": 1100, "height": 900}, color_scheme=request.param) as opened:
        yield opened


@pytest.mark.parametrize("name", WIDGETS)
def test_it_is_read_reached_and_announced(name: str, page: Any, tmp_path: Path) -> None:
    make, fewest = WIDGETS[name]
    page.goto(save_page(tmp_path / "page.html", make()).as_uri())
    page.locator(".refine-lab").wait_for(state="attached")
    settle(page)
    for canvas in page.locator(".token-map canvas.text").all():
        canvas.hover(position={"x": 80, "y": 16})
        page.locator(".tip:popover-open .target").wait_for()
    assert len(contrasts(page)) >= 1
    assert unreadable(page) == {}
    assert stops(page) >= fewest
    assert unreached(page) == []
    assert nameless(page) == []
    if name == "curves":
        told = page.locator("[role=status]").inner_text()
        assert told.startswith("Run 0: running; Run 1: finished: mostly noise; ")
        assert page.locator(".runs .warning").all_inner_texts() == ["mostly noise"]
    live = "[role=status], [role=alert], [aria-live=polite], [aria-live=assertive]"
    for part in page.locator(".refine-lab .status, .refine-lab > .error").all():
        assert part.evaluate(f"node => node.closest('{live}') !== null"), part.evaluate("node => node.outerHTML")
    assert violations(page) == []
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for theme in VSCODE:
        if ("dark" in theme) != dark:  # the system's preference must not matter there
            like_vscode(page, theme)
            page.wait_for_timeout(50)
            assert unreadable(page) == {}, theme


def test_a_slider_sends_what_it_is_let_go_at(page: Any, tmp_path: Path) -> None:
    """A page whose first slider another one follows: what follows is what would be sent to Python."""
    one, other = slider(), StepSlider(label="sent", last=100, value=50)
    page.goto(
        save_page(
            tmp_path / "page.html", one, other, links=[(one, "value", other, "value"), (other, "value", one, "value")]
        ).as_uri()
    )
    dragged = page.get_by_role("slider", name="rollouts at step", exact=True)
    box = dragged.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 5, box["y"] + box["height"] / 2, steps=4)
    assert page.get_by_role("status").all_inner_texts() == ["100 of 100", "50 of 100"]  # an output is a live region
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()  # where it was taken, which the browser calls no change
    page.wait_for_timeout(50)
    page.get_by_role("slider", name="sent", exact=True).press("Home")
    assert page.get_by_role("status").all_inner_texts() == ["0 of 100", "0 of 100"]
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 5, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert page.get_by_role("status").all_inner_texts() == ["100 of 100", "100 of 100"]
    for key, value in {"Home": 0, "ArrowRight": 1, "ArrowUp": 2, "PageUp": 12, "ArrowLeft": 11, "End": 100}.items():
        page.keyboard.press(key)
        assert page.get_by_role("status").all_inner_texts() == [f"{value} of 100"] * 2


def test_what_cannot_be_read_or_reached_is_found(page: Any) -> None:
    """The measure itself, on colours whose contrast is known."""
    page.set_content("""<style>* { color: #000 }</style><main class="refine-lab" style="background: #fff">
        <p style="color: #767676">enough</p> <p style="color: #777">little</p> <p style="color: #0008">seen through</p>
        <div style="background: #000"><p style="color: #fff">white</p><p style="background: #fff8; color: #555">grey</p></div>
        <div style="opacity: 0.5"><p>half</p></div> <p hidden style="color: #fff">hidden</p>
        <svg width="60" height="20"><text y="12" style="fill: #aaa">drawn</text></svg>
        <input aria-label="named" value="typed" style="color: #999; background: #fff"><button><b></b></button>
        <a href="#" style="color: #00f" onkeydown="event.preventDefault()">trap</a><button>beyond it</button></main>""")
    ratios = {text.removeprefix("refine-lab: "): ratio for text, ratio in contrasts(page).items()}
    assert ratios["enough"] == pytest.approx(4.54, abs=0.01)
    assert ratios["white"] == pytest.approx(21)
    assert {text.removeprefix("refine-lab: ") for text in unreadable(page)} == (
        {"little", "seen through", "grey", "half", "drawn", "typed"}
    )
    assert nameless(page) == ["button"]
    found = [rule.partition(":")[0] for rule in violations(page, ".refine-lab")]
    assert "button-name" in found and found.count("color-contrast") >= 3
    assert unreached(page) == ["<button>beyond it</button>"]
