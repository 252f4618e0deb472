"""The memory view in JupyterLab, and its saved page on a narrow screen: a click, heads, erasing and undo."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.lab import Lab, faultless_page, opened, playwright, take_shots, write_notebook

pytestmark = pytest.mark.browser

CELL = """from refine_lab.explore.client import shared_worker
from widgets.memory_view import MemoryView
TEXT = "The door is red.\\nThe secret word for hand is width.\\n" + "The ferry leaves at noon. " * 12
TEXT += "\\nWhat is the secret word for hand? The secret word for hand is"
view = MemoryView(text=TEXT, answer=" width", worker=shared_worker("cpu"))
view.shown.add_done_callback(lambda _: view.save_html("memory.html"))
view"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("memory")
    write_notebook(folder / "memory.ipynb", [CELL])
    with opened(folder, "memory.ipynb", chromium, OMP_NUM_THREADS="1") as there:
        there.run_all()
        there.page.locator(".memory-result h3", has_text="·width").wait_for()
        yield there


def has(lab: Lab, selector: str, text: str) -> None:
    lab.page.locator(selector, has_text=re.compile(text)).first.wait_for()


def test_a_click_explains_heads_restrict_and_erasing_is_undone(lab: Lab) -> None:
    page = lab.page
    page.locator(".token-map canvas.text").click(position={"x": 200, "y": 20 + 22})
    has(lab, ".memory-result h3", "^log p of .* after token [0-9]+$")
    page.locator(".memory-result h3", has_text="·width").wait_for(state="detached")
    clicked = page.locator(".memory-result h3").inner_text()
    page.get_by_role("button", name="Explain the answer").click()
    has(lab, ".memory-result h3", "·width")
    page.locator(".token-map canvas.text").focus()
    page.keyboard.press("Enter")  # on the token that is selected already
    page.locator(".memory-result h3", has_text=clicked).wait_for()
    page.get_by_role("button", name="Explain the answer").click()
    has(lab, ".memory-result h3", "·width")

    page.locator(".memory-grid [data-cell='3 0']").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")  # the keyboard alone chooses a head
    has(lab, ".memory-grid .count", "1 of 8 heads chosen")
    has(lab, ".memory-result h4", "layer 3 state head 1")
    page.locator(".memory-grid .row", has_text="layer 3").click()
    has(lab, ".memory-grid .count", "2 of 8 heads chosen")
    page.get_by_role("button", name="All heads").click()
    has(lab, ".memory-result h4", "in all heads")

    page.get_by_role("button", name="Mark the strongest write").click()
    marked = page.get_by_label("tokens to erase")
    page.wait_for_function("node => /^\\d+-\\d+$/.test(node.value)", arg=marked.element_handle())
    strongest = marked.input_value()
    marked.fill("5")
    marked.press("Enter")
    marked.fill(strongest)  # typed while the kernel still answers the text before
    page.get_by_role("button", name="Erase", exact=True).click()
    has(lab, ".memory-result .change", f"^Without the writes of tokens {strongest} in all heads")
    has(lab, ".memory-result .change", "^Without the writes of tokens .* in all heads, log p falls from")
    assert page.locator(".memory-result thead th").all_inner_texts() == ["With all writes", "Without the erased writes"]
    page.get_by_role("button", name="Roll out both").click()
    has(lab, ".rollout-pairs h3", "reference: the greedy answer with all writes")
    assert page.locator(".rollout-pairs tbody th[scope=row]").all_inner_texts() == ["all writes", "erased"] * 4
    take_shots(page, "memory")
    page.get_by_role("button", name="Erase as many random tokens").click()
    has(lab, ".memory-result thead th", "^Without [23] random tokens$")
    page.get_by_role("button", name="Undo").click()
    page.locator(".memory-result .change:empty").wait_for(state="attached")
    assert page.locator(".memory-result thead th").all_inner_texts() == ["With all writes"]
    page.get_by_role("button", name="Undo").click()
    has(lab, ".notice .error", "the number of erasures must be at least 1")
    picker = page.get_by_label("model", exact=True)
    picker.fill("no-such-model")
    page.get_by_role("button", name="Read", exact=True).click()
    has(lab, ".notice .error", "no-such-model")
    has(lab, ".entry-field .error", "still shows tiny-deltanet")
    assert picker.input_value() == "no-such-model"  # and nothing else is read
    has(lab, ".memory-result .model", "^Model: tiny-deltanet")
    page.get_by_label("choose a model or a run").select_option("tiny-lact")
    has(lab, ".memory-result .model", "^Model: tiny-lact")
    assert picker.input_value() == "tiny-lact"
    assert lab.errors == []
    assert lab.foreign == []


def test_the_saved_page_fits_a_narrow_screen_and_goes_to_a_write(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (path,) = tmp_path_factory.getbasetemp().glob("memory[0-9]*/memory.html")
    browser = lab.page.context.browser
    assert isinstance(browser, playwright.Browser)
    with faultless_page(browser, viewport={"width": 480, "height": 900}) as page:
        page.goto(path.as_uri())
        page.locator(".memory-result .writes button").nth(1).click()
        page.locator(".token-map .status", has_text="highlighted token").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 480
        assert page.locator(".memory-grid button:visible").count() == 0  # nothing that only Python answers
