"""The panels in JupyterLab, in Chromium, by the keyboard alone: every action, what JupyterLab leaves alone, what is read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.lab import Lab, Notebook, change_theme, opened, take_shots, write_notebook
from tests.support.readable import STOPS, contrasts, nameless, stops, unreached, unreadable, violations

pytestmark = pytest.mark.browser

CELLS = (
    "from refine_lab.explore.client import shared_worker\nfrom widgets.reward_explorer import RewardExplorer\n"
    "explorer = RewardExplorer(worker=shared_worker('cpu'))\nexplorer",
    "from widgets.ttt_panel import TTTPanel\npanel = TTTPanel(worker=shared_worker('cpu'))\npanel",
)
EXPLORER = ".refine-panel:has(.reward-summary)"
TTT = ".refine-panel:has(.answers)"
TEXT = "The red fox sleeps in the den. The blue bird sings in the tree. " * 4
FOCUSED = """() => { const node = document.activeElement;
    return node.getAttribute("aria-label") ?? (node.labels?.[0] ?? node).textContent.trim(); }"""
BY_JUPYTERLAB = """() => { window.executed = [];
    jupyterapp.commands.commandExecuted.connect((_, { id }) => id.startsWith("notebook:") && window.executed.push(id)); }"""
BUSY = """() => { const { kernel } = jupyterapp.shell.currentWidget.sessionContext.session;
    kernel.requestExecute({ code: "__import__('time').sleep(1)", silent: true, store_history: false }); }"""
PYTHON = """async (expression) => {
    const { kernel } = jupyterapp.shell.currentWidget.sessionContext.session;
    const asked = { code: "", silent: true, store_history: false, user_expressions: { it: expression } };
    return (await kernel.requestExecute(asked).done).content.user_expressions.it.data["text/plain"]; }"""


@dataclass(kw_only=True)
class Hands(Notebook):
    """A person at one of the panels, who has a keyboard and nothing else."""

    panel: str

    def begin(self) -> None:
        """With the focus on the first thing of the panel."""
        self.page.evaluate(f"({STOPS})({self.panel!r})[0].focus()")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def write(self, text: str) -> None:
        """In place of what is there."""
        self.press("Control+a")
        self.page.keyboard.type(text)

    def go_to(self, name: str, key: str = "Tab") -> None:
        """By Tab, or back by Shift+Tab, to what has this name in the panel, and not in the other one."""
        passed, here = [], f"document.activeElement.closest({self.panel!r}) !== null"
        for _ in range(80):
            self.press(key)
            passed.append(self.page.evaluate(FOCUSED))
            if re.fullmatch(name, passed[-1]) and self.page.evaluate(here):
                return
        raise AssertionError(f"no {name} among {passed}")

    def told(self, words: str, kind: str = "status") -> str:
        """The status, or the error, once it holds the words (a regular expression)."""
        found = self.page.locator(f"{self.panel} .notice .{kind}").filter(has_text=re.compile(words))
        found.wait_for()
        return found.inner_text()

    def in_python(self, expression: str) -> str:
        return self.page.evaluate(PYTHON, expression)

    def wait_for_python(self, expression: str) -> None:
        """Waits until an expression is true in Python, which has not yet received all that the page has sent."""
        deadline = time.monotonic() + 60
        while self.in_python(f"bool({expression})") != "True":
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    write_notebook(folder / "panels.ipynb", CELLS)
    with opened(folder, "panels.ipynb", chromium, OMP_NUM_THREADS="1") as there:
        there.run_all()
        Hands(lab=there, panel=EXPLORER).told("64 rollouts at 8 sampled positions")
        Hands(lab=there, panel=TTT).told("tokens, mean entropy")
        there.page.evaluate(BY_JUPYTERLAB)
        there.page.on("filechooser", lambda chooser: None)  # from now on Playwright answers for the system's dialog
        yield there


@pytest.fixture
def hands(lab: Lab) -> Iterator[Callable[[str], Hands]]:
    """At a panel, at its first thing; JupyterLab must have done nothing to the notebook meanwhile."""

    def at(panel: str) -> Hands:
        made = Hands(lab=lab, panel=panel)
        made.begin()
        return made

    notebook = "jupyterapp.shell.currentWidget.content"
    state = f"[{notebook}.widgets.length, {notebook}.mode, {notebook}.model.sharedModel.cells.map(({{ id }}) => id)]"
    before = lab.page.evaluate(state)
    yield at
    assert lab.page.evaluate("window.executed") == []
    assert lab.page.evaluate(state) == before


def test_adapt_with_what_is_typed_and_chosen(hands: Callable[[str], Hands]) -> None:
    person = hands(TTT)
    person.write(TEXT)
    person.press("Tab")
    person.write("The red fox sleeps in the")
    person.go_to("method")
    person.press("ArrowDown")  # SFT, which has no reward: its list is disabled, perhaps while it has the focus
    person.go_to("max answer tokens")
    person.write("6")
    person.go_to("steps", "Shift+Tab")
    person.write("3")
    person.press("Tab")
    person.write("0.002")
    person.go_to("Adapt")
    person.press("Enter")
    person.told("^After 3 steps: loss .*, entropy .* of the adapted part")
    config = "(panel.config.refine, panel.config.steps, panel.config.lr, panel.fields['question'].value)"
    assert person.in_python(config) == "(None, 3, 0.002, 'The red fox sleeps in the')"
    answers = [area.input_value() for area in person.page.locator(f"{TTT} .answers textarea").all()]
    assert all(answers) and len(answers) == 2, "another question has no reference yet"
    assert person.in_python(f"[*panel.answers.values()] == {answers}") == "True"


def test_a_second_adapt_asks(hands: Callable[[str], Hands]) -> None:
    person = hands(TTT)
    person.go_to("Adapt")
    person.press("Enter")
    person.told("^The weights are already adapted with SFT \\(3 updates\\)\\. Continue from them, or start over")
    choice = person.page.locator(f"{TTT} button", has_text="Start over")
    choice.wait_for()
    person.go_to("Cancel")
    person.press("Enter")
    choice.wait_for(state="hidden")
    assert person.in_python("len(panel.steps)") == "4"
    person.go_to("Adapt", "Shift+Tab")
    person.page.evaluate(BUSY)  # the question comes late, and the status has its words already
    person.press("Enter")
    choice.wait_for()
    person.go_to("Continue from the adapted weights")
    person.press("Enter")
    person.told("^After 6 steps: loss .* from the original weights")
    person.go_to("Reset", "Shift+Tab")
    person.press("Enter")
    person.told("^Original weights restored exactly \\(6 updates undone\\)")


WHOLE = """(list) => {
    const free = list.cloneNode();
    free.append(list.options[0].cloneNode(true));
    free.style.cssText = "flex: none; min-width: 0";
    list.after(free);
    const wide = free.offsetWidth;
    free.remove();
    return list.offsetWidth >= wide; }"""
"""Whether a list is at least as wide as its first option, which it shows when nothing is chosen."""

LINES = """(root) => [...document.querySelectorAll(`${root} .live-curves g[data-line]`)].map((group) => [
    group.closest("svg").dataset.panel, group.dataset.line, group.querySelectorAll("path.mark").length,
    Number.parseFloat(getComputedStyle(group.querySelector("path.line")).strokeWidth)])"""


def test_the_held_out_rest_by_the_slider(hands: Callable[[str], Hands]) -> None:
    """The share is chosen by arrows; the remainder's curve is in front, and the sentence is that of Python."""
    person = hands(TTT)
    person.write(TEXT)
    person.go_to("Held-out remainder")
    person.press("Home")
    slider = person.page.get_by_role("slider", name="Held-out remainder", exact=True)
    assert slider.get_attribute("aria-valuetext") == "0 %"
    person.press(*["PageUp"] * 4, "ArrowRight", "ArrowUp")
    assert slider.get_attribute("aria-valuetext") == person.page.locator(f"{TTT} .step-slider output").inner_text()
    share = int(slider.input_value())
    assert 30 < share < 50
    known = f"Held-out remainder {share} %"
    person.wait_for_python(f"{known!r} in repr(panel.fields['held_out'])")
    person.go_to("steps")
    person.write("3")
    person.go_to("Adapt")
    person.press("Enter")
    person.told("^After 3 steps: loss .* of the adapted part")
    assert person.in_python("panel.prompt.held.stop - panel.prompt.held.first") == person.in_python(
        f"round(panel.prompt.held.stop * {share} / 100)"
    )
    result = person.page.locator(f"{TTT} .rest-result")
    shown = result.get_by_role("status").filter(has_text="nats per token")
    shown.wait_for()
    said = shown.inner_text()
    assert person.in_python(f"panel.rest.sentence == {said!r}") == "True"
    assert result.locator("svg .estimate").count() == 1 and result.locator("svg .interval").count() == 3
    lines = person.page.evaluate(LINES, TTT)
    assert [line[:3] for line in lines] == [[name, "SFT", 4] for name in ("rest_loss", "loss", "entropy")]
    assert lines[0][3] > lines[1][3]
    person.go_to("Held-out NTP loss, nats per token.*")
    person.press("Home")
    before = person.in_python("f\"{panel.steps[0]['rest_loss']:.4g}\"").strip("'")
    drawing = person.page.locator(f"{TTT} svg[data-panel=rest_loss]")
    assert f"SFT: {before}" in drawing.get_attribute("aria-valuetext")
    person.begin()
    person.go_to("Reset")
    person.press("Enter")
    person.told("^Original weights restored exactly")


def test_no_rest_is_held_out_at_the_sliders_beginning(hands: Callable[[str], Hands]) -> None:
    person = hands(TTT)
    person.go_to("Held-out remainder")
    person.press("Home")
    person.go_to("Adapt")
    person.press("Enter")
    person.told("^After 3 steps: loss .*nats per token, from the original weights\\)")
    assert person.page.locator(f"{TTT} .rest-result").inner_text().strip() == ""
    assert [line[0] for line in person.page.evaluate(LINES, TTT)] == ["loss", "entropy"]
    person.begin()
    person.go_to("Reset")
    person.press("Enter")
    person.told("^Original weights restored exactly")


def test_stop_and_reset_are_next_to_a_button_that_is_disabled(hands: Callable[[str], Hands]) -> None:
    """Chromium takes the focus from a button that is disabled while it has it; Tab goes on from its place."""
    person = hands(TTT)
    person.go_to("method")
    person.press("ArrowUp")
    rewards = person.page.locator(TTT).get_by_label("reward", exact=True)
    person.page.wait_for_function("list => !list.disabled", arg=rewards.element_handle())
    person.go_to("reward")
    person.press("h")  # hybrid
    person.wait_for_python("panel.config.refine.reward == 'hybrid'")
    person.go_to("steps")
    person.write("10000")
    person.go_to("Adapt")
    person.press("Space")
    person.told("^Step [2-9]")
    person.press("Tab")
    assert person.page.evaluate(FOCUSED) == "Stop"
    person.press("Enter")
    person.told(r"\(stopped\): loss")
    assert person.in_python("panel.config.refine.reward") == "'hybrid'"
    person.press("Tab")
    assert person.page.evaluate(FOCUSED) == "Reset"
    person.press("Space")
    person.told(r"^Original weights restored exactly \(\d+ updates? undone\)")


def test_an_answer_is_reached_and_not_changed(hands: Callable[[str], Hands]) -> None:
    person = hands(TTT)
    person.go_to("answer after REFINE")
    answer = "document.activeElement.value"
    before = person.page.evaluate(answer)
    person.press("x", "Delete", "ArrowDown", "Enter", "Control+a")
    assert person.page.evaluate(answer) == before != ""
    assert person.page.evaluate("String(getSelection())") == before  # which Control+C copies


def test_a_document_is_typed_and_a_file_opened(hands: Callable[[str], Hands], tmp_path: Path) -> None:
    person = hands(EXPLORER)
    person.page.evaluate(BUSY)  # what is sent meanwhile must come in its order
    person.write(TEXT)
    person.press("Tab")
    assert person.page.evaluate(FOCUSED) == "Read"
    person.press("Enter")
    person.page.wait_for_function("Number(document.querySelector('.token-map').dataset.tokens) < 200")
    person.told("rollouts at [1-8] sampled position")
    assert person.in_python(f"explorer.token_map.text.text == {TEXT!r}") == "True"
    (tmp_path / "of_a_file.txt").write_text("def area(width, height):\n    return width * height\n\n" * 9)
    for key in ("Enter", "Space"):
        person.go_to("Open a file .*", "Tab" if key == "Enter" else "Shift+Tab")
        with person.page.expect_file_chooser() as chooser:
            person.press(key)
        chooser.value.set_files(tmp_path / "of_a_file.txt")
        person.page.wait_for_function("document.activeElement.textContent.includes('(1)')")
        person.press("Tab")
    person.told("rollouts at [1-8] sampled position")
    assert person.in_python("explorer.token_map.text.text.count('width')") == "18"


def test_another_model_and_other_settings(hands: Callable[[str], Hands]) -> None:
    person = hands(EXPLORER)
    person.go_to("compare with")
    assert person.page.locator(f"{EXPLORER} .entry-field select:visible").evaluate(WHOLE), "the closed list is cut"
    person.page.keyboard.type("tiny-lact")
    person.press("Enter")
    person.page.locator(f"{EXPLORER} .token-map select option[value=entropy_change]").wait_for(state="attached")
    person.page.wait_for_function(f"document.querySelector('{EXPLORER} .token-map select').value === 'entropy_change'")
    person.go_to("advantage group")
    person.press("ArrowDown")
    person.press("Tab")
    person.write("5")
    person.press("Tab", "ArrowUp", "ArrowUp", "ArrowUp")  # quicker than rollouts are made
    person.press("Tab")
    person.told("^88 rollouts at 8 sampled positions")
    refine = "[getattr(explorer.exploration.refine, name) for name in ('group_by', 'rollout_length', 'group_size')]"
    assert person.in_python(refine) == "['sequence', 5, 11]"
    person.go_to(".*tokens, coloured by.*")
    person.press("ArrowRight", "ArrowRight", "Enter")
    person.told("^88 rollouts at 8 sampled positions, .*; 11 rollouts at 1 clicked position")
    assert person.page.locator(f"{EXPLORER} .notice .error").inner_text() == ""


@pytest.mark.parametrize(("panel", "fewest"), [(EXPLORER, 40), (TTT, 15)])
def test_all_of_it_is_reached_and_named_and_keeps_its_keys(
    hands: Callable[[str], Hands], panel: str, fewest: int
) -> None:
    person = hands(panel)
    assert stops(person.page, panel) >= fewest
    assert unreached(person.page, panel, inside=True) == []
    assert nameless(person.page, panel) == []
    person.begin()
    while person.page.evaluate(f"document.activeElement.closest({panel!r}) !== null"):
        person.press("y", "Backspace", "Tab")  # the y is a command of JupyterLab's: of letters the most harmless


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("panel", [EXPLORER, TTT])
def test_it_is_readable_with_a_status_and_an_error(hands: Callable[[str], Hands], panel: str, theme: str) -> None:
    person = hands(panel)
    lines = f"[...document.querySelectorAll('{panel} .line')].map((line) => line.style.top)"
    if panel == EXPLORER:
        person.page.locator(f"{panel} .scroller").first.evaluate("node => (node.scrollTop = 300)")
        person.page.wait_for_timeout(100)
    before = person.page.evaluate(lines)
    change_theme(person.page, theme)
    assert person.page.evaluate(lines) == before, "the list is not empty where it was scrolled to"
    assert len(contrasts(person.page, panel)) > 20
    assert unreadable(person.page, panel) == {}
    assert violations(person.page, panel) == []
    assert person.page.locator(f"{panel} [title=null]").count() == 0
    if panel == EXPLORER:
        person.go_to("compare with")
        person.write("nowhere")
        person.press("Enter")
        person.told("there is no model 'nowhere'", "error")
    else:
        person.go_to("lr")
        person.write("0")
        person.go_to("Adapt")
        person.press("Enter")
        person.told("lr must be above 0", "error")
    assert unreadable(person.page, panel) == {}
    take_shots(person.page, f"panel_{'explorer' if panel == EXPLORER else 'ttt'}")


def test_no_page_error_and_nothing_from_elsewhere(lab: Lab) -> None:
    assert lab.errors == []
    assert lab.foreign == []
