"""The token map in Chromium: what is painted, moved in, found, copied; in a page of its own, and with a kernel."""

from __future__ import annotations

import base64
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from tests.support.hostile import HOSTILE
from widgets.core.page import page as page_of
from widgets.token_map import Alternatives, Metric, Target, TokenMap, TokenText

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
from tests.support.lab import FLAGS, PATIENCE, TOKEN, serve, settle  # noqa: E402

pytestmark = pytest.mark.browser

MAP = "canvas.text"
WORDS = ("The", " quick", " brown", " fox", " jumps", " over", " the", " lazy", " dog", ".", "\n")


@dataclass(kw_only=True)
class Window:
    """A page in Chromium, and what it did wrong."""

    page: playwright.Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: Path) -> None:
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".token-map[data-painted]", state="attached")

    def settle(self) -> None:
        settle(self.page)

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def data(self, name: str) -> int:
        return int(self.page.get_attribute(".token-map", f"data-{name}") or -9)

    @property
    def status(self) -> str:
        return self.page.inner_text(".token-map .status")

    def pixel(self, x: float, y: float, canvas: str = MAP) -> tuple[int, ...]:
        script = "([name, x, y]) => [...document.querySelector(name).getContext('2d').getImageData(x, y, 1, 1).data]"
        return tuple(self.page.evaluate(script, [canvas, x, y])[:3])

    def colours(self, canvas: str = MAP) -> set[tuple[int, ...]]:
        """All colours painted on a canvas."""
        script = """name => { const c = document.querySelector(name);
            const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);
            return [...new Set(d)].map(v => [v & 255, v >> 8 & 255, v >> 16 & 255, v >>> 24]); }"""
        return {tuple(colour) for colour in self.page.evaluate(script, canvas)}


@pytest.fixture(scope="module")
def windows(chromium: str) -> Iterator[Callable[..., Window]]:
    """Opens windows, and looks in the end whether any did wrong."""
    opened: list[Window] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)

        def new(**options: Any) -> Window:
            options = {"viewport": {"width": 1000, "height": 640}} | options
            window = Window(page=browser.new_context(**options).new_page())
            window.page.set_default_timeout(PATIENCE)
            window.page.on("pageerror", lambda error: window.errors.append(str(error)))
            window.page.on(
                "console", lambda message: window.errors.append(message.text) if message.type == "error" else None
            )
            window.page.on("request", lambda request: window.requests.append(request.url))
            opened.append(window)
            return window

        yield new
        browser.close()
    assert [error for window in opened for error in window.errors] == []
    foreign = [url for window in opened for url in window.requests if not url.startswith(("file://", "blob:", "data:"))]
    assert foreign == []


def words(count: int) -> TokenText:
    parts = [WORDS[i % len(WORDS)] for i in range(count)]
    return TokenText("".join(parts), np.cumsum([0, *map(len, parts)]))


def metrics(count: int) -> list[Metric]:
    values = np.sin(np.arange(count) * 0.7) * 2 + 3
    values[0] = np.nan
    values[count // 2] = 9.0
    return [
        Metric("entropy", "Entropy", "nats", values, low=0, high=6),
        Metric("change", "Change", "nats", values - 3, diverging=True),
    ]


def document(count: int = 3000, **more: Any) -> TokenMap:
    return TokenMap(words(count), metrics(count), **more)


@pytest.fixture
def shown(windows: Callable[..., Window], tmp_path: Path) -> Iterator[Callable[..., Window]]:
    """Opens a map in a page without Python."""
    made: list[Window] = []

    def show(widget: TokenMap, **options: Any) -> Window:
        window = windows(**options)
        window.open(widget.save_html(tmp_path / "map.html"))
        window.settle()
        made.append(window)
        return window

    yield show
    for window in made:
        window.page.context.close()


def take_shot(window: Window, name: str) -> None:
    """A picture, where REFINE_SHOTS names a folder."""
    if folder := os.environ.get("REFINE_SHOTS"):
        window.page.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_painted_in_the_colours_of_their_values(shown: Callable[..., Window], scheme: str) -> None:
    values = [0.0, 6.0, np.nan]
    text = TokenText("abcdef", [0, 2, 4, 6])
    window = shown(TokenMap(text, [Metric("m", "Metric", "", values, low=0, high=6)]), color_scheme=scheme)
    ends = {"light": ((246, 241, 230), (74, 18, 89)), "dark": ((33, 29, 43), (251, 233, 166))}[scheme]
    painted = window.colours()
    assert {(*end, 255) for end in ends} <= painted
    ink = {"light": (34, 34, 34), "dark": (232, 232, 232)}[scheme]
    assert (*ink, 255) in painted  # of the token without a value
    assert (0, 0, 0, 255) in painted
    assert (255, 255, 255, 255) in painted
    take_shot(window, f"small_{scheme}")


def test_the_scheme_may_change_while_it_is_open(shown: Callable[..., Window]) -> None:
    window = shown(document(100))
    assert (89, 89, 89, 255) in window.colours()  # the numbers beside the rows
    window.page.emulate_media(color_scheme="dark")
    window.settle()
    window.settle()
    assert (89, 89, 89, 255) not in window.colours()
    assert (176, 176, 176, 255) in window.colours()
    assert (
        window.page.evaluate("getComputedStyle(document.querySelector('.frame')).backgroundColor") == "rgb(17, 17, 17)"
    )


def test_only_the_visible_is_painted_and_scrolling_goes_on(shown: Callable[..., Window]) -> None:
    window = shown(document(65_536))
    assert (window.data("tokens"), window.data("first")) == (65_536, 0)
    assert window.data("last") < 600
    window.page.evaluate("document.querySelector('.scroller').scrollTop = 1e9")
    window.settle()
    assert window.data("last") == 65_535
    assert window.data("first") > 65_000
    canvas = window.page.evaluate("(c => [c.width, c.height])(document.querySelector('canvas.text'))")
    assert canvas[1] <= 430


def test_the_metric_is_chosen_and_the_legend_follows(shown: Callable[..., Window]) -> None:
    window = shown(document())
    legend = window.page.locator(".legend")
    assert re.split(r"\s+", legend.inner_text()) == ["Entropy", "nats", "0", "2", "4", "≥", "6"]
    before = window.colours()
    window.page.select_option("select", "change")
    window.settle()
    assert "Change nats" in legend.inner_text()
    assert "≤ −" in legend.inner_text() or "−2" in legend.inner_text()
    assert window.colours() != before
    assert window.page.get_attribute(MAP, "aria-label") == "3,000 tokens, coloured by Change"


def test_targets_borders_and_empty_tokens_are_drawn(shown: Callable[..., Window]) -> None:
    text = TokenText("ab cd ef", [0, 3, 3, 6, 8])
    plain = shown(TokenMap(text)).colours()
    marked = shown(TokenMap(text, targets=[Target(2, "<b>here</b>")], chunk_borders=[0, 3]))
    assert (171, 90, 2, 255) in marked.colours() - plain  # the frame's colour
    assert (0, 99, 160, 255) in marked.colours() - plain  # the border's
    assert marked.page.inner_text(".legend") == ""  # no metric, no scale
    marked.page.focus(MAP)
    marked.keys("ArrowRight", "ArrowRight", "ArrowRight")
    assert marked.status == "token 2: “cd ” · <b>here</b>"
    marked.keys("ArrowLeft")
    assert marked.status == "token 1: “part of a character”"
    marked.keys("End")
    assert marked.status == "token 3: “ef” · chunk 2 begins"
    take_shot(marked, "marks")


def test_hover_tells_everything(shown: Callable[..., Window]) -> None:
    count = len(WORDS)
    ids, shares = np.tile([0, 1], (count, 1)), np.tile([0.75, 0.0625], (count, 1))
    strings = [" quick", "<img onerror=hacked=1 src=x>"]
    widget = TokenMap(
        words(count), metrics(count), targets=[Target(1, "first")], alternatives=Alternatives(ids, shares, strings)
    )
    window = shown(widget)
    box = window.page.locator(MAP).bounding_box()
    assert box is not None
    window.page.mouse.move(box["x"] + 85, box["y"] + 16)
    window.page.wait_for_selector(".tip:popover-open")
    lines = window.page.inner_text(".tip").split("\n")
    joined = " ".join(" ".join(lines).split())
    assert joined == (
        "quick 1 of 11 ◆ first Entropy 4.288 nats Change 1.288 nats most likely tokens "
        "quick ✓ 75.0 % <img onerror=hacked=1 src=x> 6.25 %"
    )
    assert window.page.evaluate("window.hacked") is None
    take_shot(window, "tip")
    window.page.mouse.move(1, 1)
    assert window.page.locator(".tip:popover-open").count() == 0


# -- moved in ------------------------------------------------------------------------------------------------------------


def test_a_click_selects_and_links_follow(windows: Callable[..., Window], tmp_path: Path) -> None:
    one, other = document(200), document(200)
    path = tmp_path / "two.html"
    path.write_text(page_of(one, other, links=[(one, "selected", other, "selected"), (one, "metric", other, "metric")]))
    window = windows()
    window.open(path)
    box = window.page.locator(MAP).first.bounding_box()
    assert box is not None
    window.page.mouse.click(box["x"] + 85, box["y"] + 16)
    window.settle()
    said = window.page.locator(".status").all_inner_texts()
    assert said[0] == said[1] == "selected token 1: “ quick” · Entropy 4.288 nats"
    window.page.locator("select").first.select_option("change")
    window.settle()
    assert window.page.locator("select").nth(1).input_value() == "change"
    window.page.context.close()


def test_the_keyboard_alone_goes_everywhere(shown: Callable[..., Window]) -> None:
    window = shown(document())
    for _ in range(12):
        window.page.keyboard.press("Tab")
        if window.page.evaluate("document.activeElement.className") == "text":
            break
    window.keys("ArrowRight")
    assert window.status == "token 0: “The” · Entropy no value"
    window.keys("ArrowRight", "ArrowDown")
    assert window.status.startswith("token 12: “ quick”")
    window.keys("End")
    assert window.status.startswith("token 21: “↵”")
    window.keys("Home", "ArrowUp")
    assert window.status.startswith("token 0:")
    window.keys("PageDown")
    assert window.status.startswith("token 198:")  # eighteen rows of eleven
    window.keys("Control+End")
    assert window.status.startswith("token 2,999:")
    assert window.data("last") == 2999
    window.keys("Control+Home", "n")
    assert window.status == "highest value 1 of 50 · token 1,500: “ jumps” · Entropy 9 nats"
    assert window.data("first") < 1500 < window.data("last")
    window.keys("n", "p", "Enter")
    assert window.status == "selected token 1,500: “ jumps” · Entropy 9 nats"
    window.keys("Escape")
    assert window.status == "nothing selected"
    assert window.page.evaluate("document.activeElement.className") == "text"


def test_down_leaves_a_token_of_several_lines(shown: Callable[..., Window]) -> None:
    window = shown(TokenMap(TokenText("a\n\n\nb", [0, 1, 4, 5])))
    window.page.focus(MAP)
    window.keys("ArrowDown", "End")
    assert window.status.startswith("token 1: “↵↵↵”")
    window.keys("ArrowDown")
    assert window.status.startswith("token 2: “b”")
    window.keys("ArrowUp")
    assert window.status.startswith("token 1:")


def test_text_is_found(shown: Callable[..., Window]) -> None:
    window = shown(document())
    window.page.focus(MAP)
    window.keys("/")
    window.page.keyboard.type("x JUMPS o")
    window.settle()
    assert window.page.inner_text(".count") == "1 of 273"
    window.keys("Enter", "Enter")
    assert window.page.inner_text(".count") == "3 of 273"
    assert window.status.startswith("match 3 of 273 · token 25: “ fox”")
    window.keys("Shift+Enter", "Shift+Enter", "Shift+Enter")
    assert window.page.inner_text(".count") == "273 of 273"
    assert window.data("last") > 2900
    window.page.fill("input", "nowhere")
    assert window.page.inner_text(".count") == "none"
    assert window.status == "“nowhere” not found"
    window.keys("Escape", "Control+f")
    assert window.page.evaluate("document.activeElement.type") == "search"


def copied(window: Window, how: Callable[[], None]) -> str:
    """What a copy puts into the clipboard."""
    window.page.evaluate("""window.seen = '';
        document.querySelector('canvas.text').addEventListener('copy', event => {
        window.seen = event.clipboardData.getData('text/plain'); }, { once: true });""")
    how()
    return str(window.page.evaluate("window.seen"))


def test_text_is_copied(shown: Callable[..., Window]) -> None:
    window = shown(document(50))
    window.page.focus(MAP)
    window.keys("ArrowRight", "ArrowRight")
    assert copied(window, lambda: window.keys("Control+c")) == "The quick brown fox jumps over the lazy dog."
    window.keys("Shift+ArrowRight", "Shift+ArrowRight")
    assert window.status.startswith("3 tokens highlighted, to token 3: “ fox”")
    assert copied(window, lambda: window.keys("Control+c")) == " quick brown fox"
    assert window.status == "copied 16 characters"
    box = window.page.locator(MAP).bounding_box()
    assert box is not None
    window.page.mouse.move(box["x"] + 85, box["y"] + 16)
    window.page.mouse.down()
    window.page.mouse.move(box["x"] + 85, box["y"] + 38, steps=4)
    window.page.mouse.up()
    assert copied(window, lambda: window.keys("Control+c")).startswith(" quick brown fox jumps over the lazy dog.\nThe")
    window.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    window.keys("Escape")
    window.page.click("button[aria-label=Copy]")
    assert window.page.evaluate("navigator.clipboard.readText()") == "The quick brown fox jumps over the lazy dog."


def test_the_whole_document_is_downloaded_as_a_picture(shown: Callable[..., Window], tmp_path: Path) -> None:
    window = shown(document(targets=[Target(40)]))
    with window.page.expect_download() as download:
        window.page.get_by_role("button", name="PNG").click()
    download.value.save_as(path := tmp_path / download.value.suggested_filename)
    assert path.name == "document-entropy.png"
    script = """async (data) => { const image = new Image(); image.src = `data:image/png;base64,${data}`; await image.decode();
        const { width, height } = image, canvas = document.body.appendChild(document.createElement("canvas"));
        Object.assign(canvas, { width, height, className: "picture" }).getContext("2d").drawImage(image, 0, 0);
        return [height, document.querySelector(".token-map .tall").clientHeight]; }"""
    high, whole = window.page.evaluate(script, base64.b64encode(path.read_bytes()).decode())
    x, scale = [197 + 37 * i for i in range(8)], high / (whole + 74)
    saved = [window.pixel(scale * x[i], scale * (84 + 22 * i), "canvas.picture") for i in range(8)]
    found = [window.pixel(x[i], 10 + 22 * i) for i in range(8)]
    assert len({*saved}) > 4 and all(found[i] in (saved[i], (0, 0, 0)) for i in range(8))  # 0 between tokens
    assert (
        len({window.pixel(scale * at, scale * (whole + 28), "canvas.picture") for at in x}) > 2
    )  # below what is shown


def test_the_minimap_goes_anywhere(shown: Callable[..., Window]) -> None:
    window = shown(document(20_000, targets=[Target(15_000)]))
    assert len(window.colours(".minimap")) > 20
    box = window.page.locator(".minimap").bounding_box()
    assert box is not None
    window.page.mouse.click(box["x"] + 30, box["y"] + box["height"] * 0.75)
    window.settle()
    assert window.data("first") < 15_000 < window.data("last")
    window.page.mouse.move(box["x"] + 30, box["y"] + box["height"] * 0.75)
    window.page.mouse.down()
    window.page.mouse.move(box["x"] + 30, box["y"] + 1, steps=3)
    window.page.mouse.up()
    window.settle()
    assert window.data("first") == 0


def test_a_narrow_page_wraps_and_keeps_the_place(shown: Callable[..., Window]) -> None:
    window = shown(document())
    window.page.evaluate("document.querySelector('.scroller').scrollTop = 2000")
    window.settle()
    first = window.data("first")
    window.page.set_viewport_size({"width": 420, "height": 640})
    window.settle()
    window.settle()
    assert abs(window.data("first") - first) <= len(WORDS)
    assert window.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    take_shot(window, "narrow")


def test_what_is_selected_is_in_sight_at_once(shown: Callable[..., Window]) -> None:
    widget = document()
    widget.selected = 2500
    window = shown(widget)
    window.settle()
    assert window.data("first") < 2500 < window.data("last")
    assert window.status.startswith("selected token 2,500:")


def cut(text: str) -> TokenText:
    bounds = [0]
    while bounds[-1] < len(text):
        bounds.append(min(bounds[-1] + (len(bounds) % 4 if len(text) < 50_000 else 40_000), len(text)))
    return TokenText(text, bounds)


def seen(text: str) -> bool:
    return any(unicodedata.category(letter) not in {"Zs", "Mn", "Me"} for letter in text)


@pytest.fixture(scope="module")
def hostile_window(windows: Callable[..., Window]) -> Window:
    return windows()


@pytest.mark.parametrize(("name", "document"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_hostile_documents_are_shown_and_nothing_more(
    name: str, document: str, hostile_window: Window, tmp_path: Path
) -> None:
    text = cut(document)
    values = np.linspace(0, 1, len(text))
    labels = [Target(0, document[:200])] if len(text) else []
    strings = Alternatives(np.zeros((len(text), 1), int), np.ones((len(text), 1)), [document[:200]])
    widget = TokenMap(text, [Metric("m", document[:40], document[:9], values)], targets=labels, alternatives=strings)
    window = hostile_window
    window.open(widget.save_html(tmp_path / "hostile.html", title=document[:50].encode(errors="replace").decode()))
    window.settle()
    assert window.data("tokens") == len(text)
    assert (
        window.page.evaluate("document.querySelectorAll('script, img, iframe, svg, a').length") == 2
    )  # the page's own
    assert window.page.evaluate("window.hacked") is None
    assert window.errors == []
    if not len(text):
        assert window.status == "No document yet."
        return
    window.page.focus(MAP)
    window.keys("ArrowRight", "ArrowRight", "Control+End", "n", "Enter")
    assert window.data("last") >= 0
    if seen(document):
        assert len(window.colours()) > 3  # a ground, the signs on it, the gutter
    got = copied(window, lambda: window.keys("Control+Home", "Control+Shift+End", "Control+c"))
    assert got.encode("utf-16-le", "surrogatepass") == document.encode("utf-16-le", "surrogatepass")
    take_shot(window, f"hostile_{name.replace(' ', '_')}")


# -- with a kernel -------------------------------------------------------------------------------------------------------

CELL = """
from widgets.token_map import Metric, TokenMap, TokenText
parts = [" word", " \\ud800", "\\n"] * 700
offsets = [0]
for part in parts:
    offsets.append(offsets[-1] + len(part))
ask = lambda tokens: [[(f"instead of {token}", 0.5)] for token in tokens]
shown = TokenMap(TokenText("".join(parts), offsets), [Metric("m", "Number", "", range(2100))], alternatives=ask)
shown.observe(lambda change: shown.set_trait("status", f"Python has {change['new']}, {shown.view}"), "selected")
shown
"""


def test_python_and_the_page_agree(windows: Callable[..., Window], tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_code_cell(cell) for cell in (CELL.strip(), "shown.selected = 1800\nshown.error = '<b>no</b>'")
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "live.ipynb")
    server = serve(tmp_path)
    address = next(server)
    window = windows(viewport={"width": 1300, "height": 1000})
    page = window.page
    page.goto(f"{address}lab/tree/live.ipynb?token={TOKEN}")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')")
    page.wait_for_selector(".token-map[data-painted]", state="attached")
    box = page.locator(MAP).bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 75, box["y"] + 16)
    page.wait_for_function("document.querySelector('.status').textContent === 'Python has 0, 0'")
    page.mouse.move(box["x"] + 80, box["y"] + 38)
    page.wait_for_function("document.querySelector('.tip').textContent.includes('instead of 3')")
    page.keyboard.press("n")  # JupyterLab's keys are not ours
    page.wait_for_function("document.querySelector('.status').textContent.includes('token 2,099')")
    page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1")  # the click went to the first
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-cell')")
    page.wait_for_function("document.querySelector('.status').textContent.includes('Python has 1800')")
    window.settle()
    assert window.data("first") <= 1800 <= window.data("last")
    assert page.inner_text(".token-map .error") == "<b>no</b>"
    assert [url for url in window.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert [error for error in window.errors if "token" in error.lower()] == []
    window.requests.clear()
    window.errors.clear()  # JupyterLab's own
    take_shot(window, "lab")
    page.context.close()
    server.close()
