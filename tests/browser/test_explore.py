"""The workbench in JupyterLab, in Chromium: documents, rollouts and test-time training end to end; nothing from elsewhere."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from refine_lab.explore.saved import load_rollouts
from refine_lab.models import load_model
from tests.support.lab import ROOT, Lab, opened, take_shots, write_notebook

pytestmark = pytest.mark.browser

STATUS = ".notice .status"
TTT = (
    "from refine_lab.explore.client import shared_worker\nfrom widgets.ttt_panel import TTTPanel\n"
    "panel = TTTPanel(worker=shared_worker('cpu'))\npanel.fields['steps'].value = 10_000\npanel",
    "worker = shared_worker('cpu')\nbefore = worker.call('fingerprint', model='tiny-deltanet')",
    "print('the same', worker.call('fingerprint', model='tiny-deltanet') == before)",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / "explore.ipynb", folder)
    write_notebook(folder / "ttt.ipynb", TTT)
    with opened(folder, "explore.ipynb", chromium, OMP_NUM_THREADS="1") as there:
        there.run_all()
        yield there


def wait_for_status(lab: Lab, words: str) -> str:
    """The status once it holds the words (a regular expression)."""
    found = lab.page.locator(STATUS).filter(has_text=re.compile(words))
    found.first.wait_for()
    return found.first.inner_text()


def test_the_sample_is_shown_with_rollouts(lab: Lab) -> None:
    wait_for_status(lab, "64 rollouts at 8 sampled positions, mean cosine reward")
    assert "64 rollouts at 8 positions" in lab.page.locator(".rollout-inspector").inner_text()
    lab.page.locator(".reward-summary svg .bar").first.wait_for(state="attached")
    assert lab.page.locator(".reward-summary figure").count() == 4
    lab.page.locator(".state-view .strongest li").first.wait_for()
    take_shots(lab.page, "explore")


def test_a_click_on_a_token_rolls_out_there(lab: Lab) -> None:
    canvas = lab.page.locator(".token-map canvas").first
    canvas.scroll_into_view_if_needed()
    clicked = lab.page.locator(STATUS).filter(has_text="8 rollouts at 1 clicked position")
    for line in range(10, 19):  # a line may be short, or sampled there
        canvas.click(position={"x": 200, "y": 20 + 22 * line})
        with contextlib.suppress(PlaywrightTimeout):
            clicked.first.wait_for(timeout=10_000)
            break
    wait_for_status(lab, "64 rollouts at 8 sampled positions, .*; 8 rollouts at 1 clicked position")
    assert "8 of 72 rollouts" in lab.page.locator(".rollout-inspector").inner_text()
    lab.page.keyboard.press("ArrowRight")  # the keyboard alone goes on from there
    lab.page.keyboard.press("Enter")
    wait_for_status(lab, "; 16 rollouts at 2 clicked positions")


def test_another_reward_of_the_same_rollouts(lab: Lab) -> None:
    lab.page.locator("select").filter(has_text="hybrid").first.focus()
    lab.page.keyboard.press("b")  # not JupyterLab's command for another cell
    wait_for_status(lab, "64 rollouts at 8 sampled positions, mean binary reward")
    lab.page.keyboard.press("ArrowDown")
    wait_for_status(lab, "64 rollouts at 8 sampled positions, mean hybrid reward")


def test_what_cannot_be_is_said_where_one_looks(lab: Lab) -> None:
    field = lab.page.locator(".widget-label:has-text('rollouts per position (n)') + input")
    field.fill("1")
    field.press("Tab")
    alert = lab.page.locator(".notice .error").filter(has_text="needs at least 2 rollouts per position")
    alert.first.wait_for()
    lab.page.wait_for_function("node => node.value === '8'", arg=field.element_handle())


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1100, 800)])
def test_the_rollouts_of_a_click_are_beside_it(lab: Lab, width: int, height: int) -> None:
    """All of them lie in the window, without scrolling the page."""
    before = lab.page.viewport_size
    lab.page.set_viewport_size({"width": width, "height": height})
    lab.page.locator(".token-map").first.evaluate("node => node.scrollIntoView()")
    lab.page.locator(".token-map canvas.text").first.click(position={"x": 120, "y": 160})
    lab.page.locator(".refine-panel.explorer[aria-busy=false] .click-result .rollout").last.wait_for()
    boxes = [node.bounding_box() for node in lab.page.locator(".click-result .rollout").all()]
    assert len(boxes) == 8
    assert all(box and 0 < box["y"] and box["y"] + box["height"] < height for box in boxes)
    lab.page.set_viewport_size(before)


def test_numbers_are_dimmed_at_once_and_a_change_is_cancelled(lab: Lab) -> None:
    opacity = "getComputedStyle(document.querySelector('.rollout-inspector')).opacity"
    lab.page.evaluate(f"() => document.addEventListener('change', () => (window.dimmed = {opacity}))")
    field = lab.page.locator(".widget-label:has-text('tokens per rollout (k)') + input")
    for text, sentence in (("1000", "a whole number from 1 to 64, got 1000"), ("2.5", "from 1 to 64, got 2.5")):
        field.fill(text)
        field.press("Tab")
        lab.page.locator(".notice .error").filter(has_text=sentence).first.wait_for()
        lab.page.wait_for_function("node => node.value === '5'", arg=field.element_handle())
    before = lab.page.locator(".rollout-inspector").inner_text()
    field.fill("64")
    field.press("Tab")
    assert lab.page.evaluate("window.dimmed") == "0.4", "within the event, before any answer of Python"
    lab.page.get_by_role("button", name="Cancel", exact=True).click()
    wait_for_status(lab, "^Cancelled")
    lab.page.locator(".refine-panel.explorer[aria-busy=false]").wait_for()
    assert field.input_value() == "5" and lab.page.evaluate(opacity) == "1"
    assert lab.page.locator(".rollout-inspector").inner_text() == before


def test_a_download_and_a_reload_with_a_living_kernel(lab: Lab, tmp_path: Path) -> None:
    field = lab.page.locator(".widget-label:has-text('rollouts per position (n)') + input")
    field.fill("6")
    field.press("Tab")
    wait_for_status(lab, "^48 rollouts at 8 sampled positions")
    lab.page.get_by_role("button", name="Clear filters").first.click()
    with lab.page.expect_download() as download:
        lab.page.get_by_role("button", name="Parquet").click()
    download.value.save_as(tmp_path / "rollouts.parquet")
    frame, origin = load_rollouts(tmp_path / "rollouts.parquet")
    assert (~frame["clicked"]).sum() == 48 and origin["settings"]["group_size"] == 6
    lab.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    lab.page.reload()
    lab.wait_for_kernel()
    lab.page.wait_for_function("node => node.value === '6'", arg=field.element_handle())
    wait_for_status(lab, "^48 rollouts at 8 sampled positions")
    lab.page.get_by_role("button", name="Undo", exact=True).click()
    wait_for_status(lab, "^64 rollouts at 8 sampled positions")


def test_a_hostile_document_is_pasted(lab: Lab) -> None:
    """Markup, a turned direction, zero, terminal codes, and half of a pair, which only a page can send."""
    text = "<img src=x onerror=window.hacked=1></script>\u202eturned\u2069 \0 \x1b[31m \U0001f44d\U0001f3fd "
    paste = """(node, text) => { node.value = text + String.fromCharCode(0xd83d);
        for (const name of ["input", "change"]) node.dispatchEvent(new Event(name, { bubbles: true })); }"""
    lab.page.locator(".entry-field textarea").first.evaluate(paste, text)
    lab.page.get_by_role("button", name="Read", exact=True).click()
    lab.page.wait_for_function("Number(document.querySelector('.token-map').dataset.tokens) < 70")
    wait_for_status(lab, "rollouts at [1-8] sampled positions?, mean hybrid reward")
    sent = "document.querySelector('.entry-field textarea').value.slice(-2)"
    assert lab.page.evaluate(sent) == " \ufffd"  # the field says what is read
    assert lab.page.locator(".notice .error").first.inner_text() == ""
    assert lab.page.evaluate("window.hacked") is None
    assert lab.page.locator(".jp-OutputArea img[src=x]").count() == 0


def test_no_page_error_and_nothing_from_elsewhere(lab: Lab) -> None:
    assert lab.errors == []
    assert lab.foreign == []


def test_ttt_live(lab: Lab, tmp_path: Path) -> None:
    """Adapt, at least three points of a curve, stop within a step, save, and the weights put back bit for bit."""
    lab.open("ttt.ipynb")
    lab.run_all()
    button = lab.page.get_by_role("button", name="Adapt", exact=True)
    button.wait_for()
    lab.page.locator(".jp-OutputArea-output", has_text="the same True").wait_for()
    button.click()
    for name in ("rest_loss", "loss"):
        drawn = f"svg[data-panel='{name}'] g[data-line='REFINE'] path.mark"
        marks = f'document.querySelectorAll(".live-curves {drawn}").length'
        lab.page.wait_for_function(f"{marks} >= 4")  # before, and after three steps
    lab.page.get_by_role("button", name="Stop").click()
    status = wait_for_status(lab, r"\(stopped\): loss")
    steps = int(status.split()[1])
    lab.page.locator(".rest-result", has_text="beyond noise: the loss on the held-out remainder changes by").wait_for()
    assert lab.page.get_by_label("answer after REFINE", exact=True).input_value() != ""
    assert lab.page.get_by_label("reference answer", exact=True).input_value() == "width"
    lab.page.locator(".widget-label", has_text=f"Adapted with REFINE ({steps} update").wait_for()
    field = lab.page.get_by_label("save weights as")
    field.fill(str(tmp_path / "mine"))
    lab.page.get_by_role("button", name="Save weights").click()
    wait_for_status(lab, "^Saved to .*mine, which refine_lab.load_model reads as a model")
    take_shots(lab.page, "ttt")
    lab.page.get_by_role("button", name="Reset").click()
    wait_for_status(lab, f"Original weights restored exactly \\({steps} updates? undone")
    assert load_model(tmp_path / "mine")[0].config.model_type == "delta_net"


def test_ttt_compares(lab: Lab) -> None:
    """SFT and REFINE by one click: their curves overlaid, the difference first, and an answer of each."""
    field = lab.page.locator(".widget-label:has-text('steps') + input")
    field.fill("3")
    field.press("Tab")
    lab.page.get_by_role("button", name="Compare methods").click()
    wait_for_status(lab, "^After 3 steps each: loss .* \\(SFT\\), .* \\(REFINE\\); entropy")
    for method in ("SFT", "REFINE"):
        marks = f".live-curves svg[data-panel='rest_loss'] g[data-line='{method}'] path.mark"
        assert lab.page.locator(marks).count() == 4
        assert lab.page.get_by_label(f"answer after {method}", exact=True).input_value() != ""
    sentences = lab.page.locator(".rest-result .sentence").all_inner_texts()
    assert [text.split(".")[0] for text in sentences] == ["REFINE − SFT", "SFT", "REFINE"]
    assert lab.page.locator(".rest-result svg .estimate").count() == 3
    take_shots(lab.page, "ttt_compared")
    assert lab.errors == []
    assert lab.foreign == []
