"""The rollout inspector in Chromium, in a page of its own: what is painted, every key, filters, order, table F.1."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from tests.support.hostile import HOSTILE
from tests.support.readable import contrasts, unreadable
from tests.support.rollout_frames import FIND_CASES, check_page_cases, decode, given_cases, rows
from widgets.core.assets import script
from widgets.core.page import save_page
from widgets.parts.reward_summary import RewardSummary
from widgets.rollout_inspector import RolloutInspector

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from tests.support.inspector_page import (  # noqa: E402
    Window,
    browser,  # noqa: F401
    many,
    new_window,  # noqa: F401
    take_shot,
    three_positions,
    window,  # noqa: F401
)

pytestmark = pytest.mark.browser


def test_truth_and_rollouts_are_painted_token_by_token(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    assert window.shown() == [*range(12)]
    assert window.status() == "12 rollouts at 3 positions"
    assert page.locator(".target .tokens").first.locator(".token").all_inner_texts() == ["·very", "·laid", "·back"]
    assert page.locator(".target .where").first.inner_text() == "step 1 · seq 5 · pos 40 · entropy 0.000"
    second = page.locator(".rollout[data-row='1']")
    assert second.locator(".token").all_inner_texts() == ["·very", "·perfect", "·hill"]
    assert second.locator(".token").evaluate_all("n => n.map((x) => x.classList.contains('match'))") == [
        True,
        False,
        False,
    ]
    dot = "node => getComputedStyle(node, '::after').width"
    assert [second.locator(".token").nth(i).evaluate(dot) for i in range(2)] == ["5px", "auto"]
    shares = second.locator(".token").evaluate_all(
        "n => n.map((x) => [x.querySelector('.bar').offsetWidth / x.clientWidth, x.querySelector('.bar').className])"
    )
    assert [name for _, name in shares] == ["bar", "bar below", "bar"]
    assert [share for share, _ in shares] == pytest.approx([0.5, 0.25, 1.0], abs=0.02)
    assert second.locator(".number").all_inner_texts() == ["0.250", "−0.50", "0.250", "0.25", "−1.50"]
    best = page.locator(".rollout .number.best").evaluate_all(
        "n => n.map((x) => Number(x.closest('.rollout').dataset.row))"
    )
    assert sorted(best) == [3, 7, 11]
    target, below = (page.locator(name).first.bounding_box() for name in (".target .token", ".rollout .token"))
    assert target is not None and below is not None
    assert target["x"] == below["x"]  # tokens of one place stand under each other
    assert below["y"] - target["y"] == pytest.approx(26, abs=1)


def test_advantages_go_left_and_right_from_the_middle(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    bars = page.locator(".rollout .signed").evaluate_all(
        """nodes => nodes.slice(0, 4).map((node) => { const [track, bar] = [node.firstChild, node.firstChild.firstChild]
          .map((part) => part.getBoundingClientRect());
          const middle = (track.left + track.right) / 2;
          return [(bar.left - middle) / track.width, (bar.right - middle) / track.width].map((x) => Number(x.toFixed(2))); })"""
    )
    np.testing.assert_allclose(bars, [[-0.5, 0], [-0.17, 0], [0, 0.17], [0, 0.5]], atol=0.02)


def test_heads_sort(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    window.sort("reward")
    assert window.shown() == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    label = page.locator("[data-column='reward']").get_attribute("aria-label")
    assert label == "Sorted by reward, highest first; press for lowest first"
    window.sort("reward")
    assert window.shown() == [*range(12)]
    window.sort("reward")
    assert page.locator("[data-column='reward']").get_attribute("aria-pressed") == "false"
    window.sort("step")
    assert window.shown() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]


def test_fields_filter_what_python_filters_too(window: Window) -> None:
    widget = RolloutInspector(three_positions(), decode=decode)
    page = window.open(widget)
    for fields, filters, status in (
        ({"reward low": "0.5", "reward high": "1"}, {"reward": [0.5, 1]}, "3 of 12 rollouts at 2 positions"),
        ({"text": "perfect"}, {"text": "perfect"}, "2 of 12 rollouts at 2 positions"),
        ({"target": "LAID b", "step high": "1"}, {"target": "LAID b", "step": [None, 1]}, "4 of 12 rollouts at 1 position"),
        (
            {"entropy low": "0.5", "position low": "39"},
            {"entropy": [0.5, None], "position": [39, None]},
            "4 of 12 rollouts at 1 position",
        ),
        ({"text": "nowhere"}, {"text": "nowhere"}, "0 of 12 rollouts at 0 positions"),
    ):  # fmt: skip
        for name, value in fields.items():
            window.fill(name, value)
        widget.filters = filters
        assert window.shown() == widget.filtered().index.tolist()
        assert window.status() == status
        page.get_by_role("button", name="Clear filters").click()
        window.settle()
        assert page.locator("[data-filter]").evaluate_all("nodes => nodes.every((node) => node.value === '')")
        assert len(window.shown()) == 12
    assert page.locator("[data-filter='reward low']").get_attribute("placeholder") == "≥ 0"
    assert page.locator("[data-filter='reward high']").get_attribute("placeholder") == "≤ 2.75"


def test_the_page_finds_the_shared_cases(window: Window) -> None:
    """In Chromium, where rollouts are filtered, sorted and tabulated without Python."""
    code = f"""async ([module, given]) => {{
        const js = await import(URL.createObjectURL(new Blob([module], {{ type: "text/javascript" }})));
        const bytes = Uint8Array.from(atob(given.columns.base64), (letter) => letter.charCodeAt(0));
        return ({FIND_CASES})(js, {{ ...given, columns: new DataView(bytes.buffer) }}); }}"""
    check_page_cases(window.page.evaluate(code, [script("rollout_inspector"), given_cases()]))


def test_filters_set_before_are_in_the_fields(window: Window) -> None:
    widget = RolloutInspector(three_positions(), decode=decode)
    widget.filters, widget.sort, widget.selected = {"reward": [1, None], "text": "e"}, ("advantage", True), 5
    page = window.open(widget)
    assert page.locator("[data-filter='reward low']").input_value() == "1"
    assert page.locator("[data-filter='text']").input_value() == "e"
    assert window.shown() == widget.filtered().index.tolist()
    assert window.status().endswith("the selected rollout is filtered out")


def test_the_keyboard_does_everything(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    page.locator(".lines").focus()
    window.press("ArrowDown")
    assert window.selected() == 0
    window.press("ArrowDown", "ArrowDown", "ArrowUp")
    assert window.selected() == 1
    assert window.status().endswith("selected: rollout 1 at position 40, step 1, sequence 5")
    assert page.locator(".lines").get_attribute("aria-activedescendant") == page.locator(".selected").get_attribute(
        "id"
    )
    window.press("Enter", "End", "Enter")
    assert window.selected() == 11
    assert page.locator(".compared thead th").count() == 3
    window.press("Enter", "Home", "PageDown")
    assert page.locator(".compared thead th").count() == 2
    assert window.selected() == 11  # a page is longer than this list
    window.press("f")
    assert page.evaluate("document.activeElement.dataset.filter") == "text"
    page.keyboard.type("f/ laid")
    assert page.locator("[data-filter='text']").input_value() == "f/ laid"
    window.press("Escape")
    assert page.locator("[data-filter='text']").input_value() == ""
    window.press("/")
    page.keyboard.type("laid")
    window.press("Enter", "ArrowDown")  # back to the list
    assert window.selected() == 0
    assert window.shown() == [0, 3, 8]
    window.press("Escape")
    assert len(window.shown()) == 12
    window.press("Escape")
    assert page.locator(".compared").count() == 0
    window.press("Escape")
    assert window.selected() == -1
    assert "Select a rollout" in page.locator(".detail").inner_text()


def test_every_control_is_reached_by_tab_and_named(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(document.activeElement.ariaLabel || document.activeElement.closest('label, button')?.innerText) ?? ''"
            )
        )
    for name in (
        "Rollout contains",
        "lowest reward",
        "highest entropy",
        "Export examples (Table F.1)",
        "Rollouts, below the reference of their position",
    ):
        assert name in reached
    assert sum(name.startswith("Sort by ") for name in reached[:28]) >= 8


def test_the_detail_shows_one_rollout(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    page.locator(".rollout[data-row='1']").click()
    window.settle()
    detail = page.locator(".detail")
    assert detail.locator("h3").inner_text() == "Rollout 1 at position 40, step 1, sequence 5"
    assert detail.locator(".prefix").inner_text() == "…·lodge·perfect"
    lines = [
        [cell.strip() for cell in line.split("\t")] for line in detail.locator(".aligned tbody tr").all_inner_texts()
    ]
    assert lines == [
        ["1", "·very", "=", "·very", "−0.500", "0.50"],
        ["2", "·laid", "≠", "·perfect", "−0.500", "−0.25"],
        ["3", "·back", "≠", "·hill", "−0.500", "1.00"],
    ]
    assert detail.locator("dd").all_inner_texts() == ["0.250", "−0.50", "0.250", "0.25", "−1.50", "0.000"]
    page.locator(".rollout[data-row='4']").click()  # shorter than its target
    window.settle()
    assert detail.locator(".aligned tbody tr").count() == 3
    take_shot(window, "detail")


def test_pinned_rollouts_stand_side_by_side(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    for row in (2, 9):
        page.locator(f".rollout[data-row='{row}']").dblclick()
    window.settle()
    table = page.locator(".compared")
    assert table.locator("thead button:first-child").all_inner_texts() == [
        "step 1 · seq 5 · pos 40 · #2",
        "step 3 · seq 5 · pos 38 · #1",
    ]
    text = table.locator("tbody tr").all_inner_texts()
    assert text[2].split("\t") == ["reward", "0.500", "2.250"]
    assert table.locator("tr:has-text('reward') .best").all_inner_texts() == ["2.250"]
    page.get_by_role("button", name="Unpin rollout 2 at position 40, step 1, sequence 5").click()
    window.settle()
    assert table.locator("thead th").count() == 2


def test_table_f1_is_one_click_and_is_copied(window: Window) -> None:
    widget = RolloutInspector(three_positions(), decode=decode)
    page = window.open(widget)
    page.get_by_role("button", name="Export examples (Table F.1)").click()
    window.settle()
    lines = [line.split("\t") for line in page.locator(".f1 tbody tr").all_inner_texts()]
    assert lines[0] == ["Ex. 1", "GT", "·very laid back", "–"]
    assert lines[4] == ["", "P4", "·laid very back", "★ 0.750"]
    page.evaluate("() => { navigator.clipboard.writeText = async (text) => { window.copied = text; }; }")
    page.get_by_role("button", name="Copy as Markdown").click()
    page.locator(".status", has_text="Table F.1 copied.").wait_for()
    assert page.evaluate("window.copied") == widget.table_f1().markdown()
    take_shot(window, "f1")
    page.keyboard.press("Escape")
    assert page.locator("section.table").is_hidden()


def test_the_histogram_is_of_all_and_marks_what_is_shown(window: Window) -> None:
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    assert (
        page.locator(".rewards svg").get_attribute("aria-label")
        == "Rewards of 12 rollouts from 0.00 to 2.75, mean 1.375"
    )
    window.fill("reward low", "2")
    assert (
        page.locator(".rewards svg").get_attribute("aria-label")
        == "Rewards of 12 rollouts from 0.00 to 2.75, mean 1.375; 4 shown: 2.375"
    )
    places = "nodes => nodes.map((node) => Number(node.getAttribute('x')))"
    whole, shown = (page.locator(f".rewards rect.{kind}").evaluate_all(places) for kind in ("all", "shown"))
    assert len(whole) == 12 and whole[-4:] == shown
    assert shown[-1] == 200 - 200 / 32 + 0.5


def test_a_clicked_position_is_marked_and_apart(window: Window) -> None:
    frame = three_positions()
    page = window.open(RolloutInspector(frame.assign(clicked=frame["position"] == 40), decode=decode))
    assert window.status() == "12 rollouts at 3 positions, 1 clicked"
    (clicked,) = page.locator(".line.clicked .where").all_inner_texts()
    assert clicked.startswith("clicked · step 1 · seq 5 · pos 40")
    label = page.locator(".rewards svg").get_attribute("aria-label")
    own = frame[frame["position"] == 40]["reward"]
    others = frame[frame["position"] != 40]["reward"]
    assert (
        label
        == f"Rewards of {len(others)} rollouts from 0.00 to 2.75, mean {others.mean():.3f}; {len(own)} at clicked positions"
    )
    assert page.locator(".rewards rect.clicked").count() == len(own)


def test_both_figures_of_a_page_follow_the_list(window: Window) -> None:
    """Without Python: the numbers are of all rollouts of selected positions, and what the list leaves out is pale in both."""
    frame = three_positions().assign(target_logprob=-1.0)
    frame["clicked"] = frame["position"] == 40
    listed, summary = RolloutInspector(frame, decode=decode), RewardSummary(frame, "cosine")
    path = save_page(window.folder / "both.html", summary, listed, links=[(listed, "passing", summary, "passing")])
    page = window.page
    page.goto(path.as_uri())
    note, large = page.locator(".reward-summary .note"), page.locator(".reward-summary figure").first.locator("svg")
    everything = "Statistics over 8 rollouts at 2 sampled positions."
    orange = "Orange: 4 rollouts at clicked positions, excluded from the statistics."
    note.get_by_text(f"{everything} {orange}", exact=True).wait_for()
    label = large.get_attribute("aria-label")
    assert label is not None and label.startswith("Distribution of 8 rewards: mean 1.875, ")
    window.fill("reward low", "2")
    note.get_by_text(f"{everything} Pale: 4 rollouts hidden by the list's filters.", exact=True).wait_for()
    assert large.get_attribute("aria-label") == label
    assert "Rewards of 8 rollouts" in (page.locator(".rewards svg").get_attribute("aria-label") or "")
    for figure in (".reward-summary figure:first-child .bar.shown", ".rewards rect.shown"):
        assert page.locator(figure).count() == 4
    window.fill("reward low", "")
    window.fill("reward high", "0.8")
    note.get_by_text(f"{everything} Pale: 8 rollouts hidden by the list's filters. {orange}", exact=True).wait_for()
    assert page.locator(".reward-summary .rug.clicked").count() == page.locator(".rewards rect.clicked").count() == 4


def test_hostile_text_is_shown_and_nothing_more(window: Window) -> None:
    texts = [text or "(empty)" for _, text in HOSTILE]
    ids = [*range(len(texts))]
    frame = pd.concat([rows([i, 0], target=[i], prefix_ids=[ids]).assign(step=i) for i in ids], ignore_index=True)
    widget = RolloutInspector(frame, decode=lambda tokens: "".join(texts[i] for i in tokens))
    widget.selected, widget.compared = 1, [*range(8)]
    page = window.open(widget)
    page.get_by_role("button", name="Export examples (Table F.1)").click()
    page.locator(".lines").focus()
    for _ in ids:
        window.press("ArrowDown")
        assert page.locator(".aligned .token").count() == 3
    shown = {text for cell in page.locator(".token").all() if (text := cell.text_content())}
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, script:not([type]):not([src])").count() == 0
    assert any("\U00020000" in text for text in shown)
    window.fill("text", "<img src=x onerror")
    assert window.shown() == [3]
    assert page.locator(".rollout .token").first.text_content() == texts[3]
    take_shot(window, "hostile")


def test_a_hundred_thousand_rollouts_scroll(window: Window) -> None:
    widget = RolloutInspector(many(100_000, 1), decode=decode)
    page = window.open(widget)
    assert window.status() == "100,000 rollouts at 100,000 positions"
    assert page.locator(".line").count() < 60
    for share in (0.25, 0.5, 1.0):
        page.locator(".scroller").evaluate(f"node => {{ node.scrollTop = node.scrollHeight * {share}; }}")
        window.settle()
        window.settle()
        middle = window.shown()[len(window.shown()) // 2]
        assert middle == pytest.approx(100_000 * share, abs=30)
        assert page.locator(".line").count() < 60
    page.locator(".lines").focus()
    window.press("End")
    assert window.selected() == 99_999
    box, line = page.locator(".scroller").bounding_box(), page.locator(".rollout.selected").bounding_box()
    assert box is not None and line is not None
    assert box["y"] < line["y"] <= box["y"] + box["height"] - 26
    took = page.evaluate(
        """async () => { const before = performance.now(); document.querySelector("[data-column='reward']").click();
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          return performance.now() - before; }"""
    )
    assert took < 3000  # about 60 ms on a quiet machine
    window.press("Home")
    assert window.selected() == widget.rollouts["reward"].idxmax()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_ground(new_window: Callable[..., Window], scheme: str) -> None:
    widget = RolloutInspector(three_positions(), decode=decode)
    widget.selected, widget.compared = 1, [0, 5]
    window = new_window(scheme)
    page = window.open(widget)
    page.get_by_role("button", name="Export examples (Table F.1)").click()
    window.settle()
    parts = """.rollout.selected .token.match, .rollout.selected .sign, .rollout:not(.selected) .token.match .sign,
        .rollout .number, .rollout .mark, .target .where, .target .mark, .sort, .filters span, .status, .detail dt, .same,
        .unlike, .detail .prefix .sign, .compared th, .f1 td, .help span, .help .token, kbd, .tools button, figcaption span"""
    assert [part for part in re.split(r",\s+", parts) if page.locator(part).count() == 0] == []
    assert len(contrasts(page)) > 40
    assert unreadable(page) == {}
    take_shot(window, scheme)


def test_narrow_and_empty(new_window: Callable[..., Window]) -> None:
    window = new_window(width=640)
    page = window.open(RolloutInspector(three_positions(), decode=decode))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    list_box, detail = (page.locator(name).bounding_box() for name in (".list", ".detail"))
    assert list_box is not None and detail is not None
    assert detail["y"] >= list_box["y"] + list_box["height"]
    take_shot(window, "narrow")
    page = window.open(RolloutInspector(decode=decode))
    assert "No rollouts yet." in page.locator(".detail").inner_text()
    page.locator(".lines").focus()
    window.press("ArrowDown", "Enter", "End", "Escape")
    assert window.status() == "0 rollouts at 0 positions"
