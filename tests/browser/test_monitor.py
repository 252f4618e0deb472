"""The monitor in JupyterLab, in Chromium: a run goes on through a reload and a new kernel, and is found and stopped again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from refine_lab.config import DataConfig, TrainConfig
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from tests.factories.run_monitor import write_run as write_finished
from tests.support.lab import PATIENCE, Notebook, change_theme, opened, take_shots, write_notebook
from tests.support.readable import contrasts, nameless, unreadable
from widgets.figures.series import decimate

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

pytestmark = pytest.mark.browser

CELLS = ("from widgets.run_monitor import RunMonitor\nmonitor = RunMonitor('runs')\nmonitor",)
PANEL = ".live-curves svg[data-panel='train:ntp_loss']"
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
SECONDS = PATIENCE / 1000


@dataclass(kw_only=True)
class Monitored(Notebook):
    """A notebook with a monitor of one run, which nobody has begun yet."""

    run: Run

    def line(self) -> str:
        """The drawn curve."""
        line = self.page.locator(f"{PANEL} path.line")
        line.wait_for(state="attached")
        return line.get_attribute("d") or ""

    def wait_for_growth(self, before: str) -> str:
        """Waits for another line than an earlier one; the number of points stays the same once there are many."""
        path = f'document.querySelector("{PANEL} path.line")'
        self.page.wait_for_function(f"(before) => ({path}?.getAttribute('d') ?? before) !== before", arg=before)
        return self.line()

    def press(self, name: str) -> None:
        """By keyboard alone."""
        self.page.get_by_role("button", name=name, exact=True).focus()
        self.page.keyboard.press("Enter")

    def steps(self) -> int:
        """How many the run itself has written."""
        return len(self.run.metrics())


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_run(folder: Path) -> Run:
    """A run that never ends by itself: some steps a second."""
    data = DataConfig(sources={"python": 1.0}, sequence_length=256, max_tokens=50_000, validation_sequences=1)
    settings = {"refine": None, "steps": 100_000, "batch_size": 2, "mini_batch_size": 2}
    with RunWriter.create(TrainConfig(recipe="tiny", model="tiny-deltanet", data=data, **settings), folder) as writer:
        return writer.run


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("lab")
    run = write_run(folder / "runs")
    write_finished(folder / "finished", seed=0)
    write_notebook(folder / "monitor.ipynb", CELLS)
    write_notebook(folder / "finished.ipynb", [CELLS[0].replace("runs", "finished")])
    try:
        with opened(folder, "monitor.ipynb", chromium, OMP_NUM_THREADS="1") as there:
            there.run_all()
            yield Monitored(lab=there, run=run)
    finally:
        (run.path / "stop").touch()
        wait_for(lambda: not run.alive)


def test_start_and_the_curve_grows(monitored: Monitored) -> None:
    monitored.press("Start")
    monitored.page.locator(".notice .status", has_text="Started 1 run.").wait_for()
    monitored.wait_for_growth(monitored.line())
    assert monitored.run.alive


def test_the_table_of_runs_keeps_its_keys(monitored: Monitored) -> None:
    box = monitored.page.locator(".run-table [data-key=select]")
    box.focus()
    for key in ("ArrowDown", "ArrowUp", "b", "x", "Home"):
        monitored.page.keyboard.press(key)
    monitored.page.keyboard.press("Control+a")
    assert box.is_checked()
    assert monitored.page.locator(".jp-Cell.jp-mod-selected").count() <= 1
    assert box.evaluate("node => node === document.activeElement")
    assert monitored.page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length") == 1


def test_a_reload_draws_the_same_monitor_again(monitored: Monitored) -> None:
    monitored.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    before, steps = monitored.line(), monitored.steps()
    monitored.page.reload()
    monitored.wait_for_growth(monitored.wait_for_growth(before))
    assert monitored.steps() > steps
    assert monitored.page.get_by_role("button", name="Stop", exact=True).count() == 1


def test_a_new_kernel_finds_the_run_and_stops_it(monitored: Monitored) -> None:
    """What trains needs neither the kernel that started it nor the page; another monitor does what the first one could."""
    before, steps = monitored.line(), monitored.steps()
    monitored.page.evaluate(f"{KERNEL}.restart()")
    monitored.page.reload()
    wait_for(lambda: monitored.steps() > steps)  # nobody watches
    assert monitored.run.alive
    monitored.lab.wait_for_kernel()
    monitored.lab.run_all()
    monitored.page.locator(PANEL).wait_for()
    monitored.wait_for_growth(monitored.wait_for_growth(before))
    assert monitored.run.name in monitored.page.locator(".run-table td.name").all_inner_texts()
    take_shots(monitored.page, "monitor")
    monitored.press("Stop")
    monitored.page.locator(".notice .status", has_text="Asked 1 run to save and stop.").wait_for()
    monitored.page.locator(".run-table .state", has_text="stopped by you").wait_for()
    wait_for(lambda: not monitored.run.alive)
    assert monitored.run.state == "stopped"
    saved = monitored.run.latest_checkpoint()
    assert saved is not None and saved[0] == monitored.steps() > steps
    losses = monitored.run.metrics()["ntp_loss"].to_numpy(float)
    wait_for(lambda: len(re.findall("[ML]", monitored.line())) == len(decimate(losses)))  # long curves are thinned


def test_a_row_opens_the_memory_of_its_run(monitored: Monitored) -> None:
    page = monitored.page
    page.get_by_role("button", name="show the memory of").click()
    page.locator(".memory-result h3", has_text="·width").wait_for()
    assert monitored.run.name in page.locator(".memory-result").inner_text()
    monitored.press(f"close the memory of SFT, seed 0, {monitored.run.name}")
    page.locator(".memory-result").wait_for(state="detached")


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_it_is_readable_in_both_themes(monitored: Monitored, theme: str) -> None:
    change_theme(monitored.page, theme)
    assert len(contrasts(monitored.page, ".refine-panel")) > 20
    assert unreadable(monitored.page, ".refine-panel") == {}


def test_the_slider_of_steps_by_its_keys(monitored: Monitored) -> None:
    """Python says which rollouts it shows; JupyterLab does nothing to the notebook."""
    page = monitored.page
    monitored.lab.open("finished.ipynb")
    monitored.lab.run_all()
    slider = page.get_by_role("slider", name="REFINE, seed 0, rollouts at step", exact=True)
    slider.focus()
    number = page.get_by_role("status").filter(has_text="of 4")  # read out as it changes
    assert number.inner_text() == "4 of 4"
    keys = {
        "Home": 1,
        "ArrowRight": 2,
        "ArrowUp": 3,
        "End": 4,
        "PageDown": 3,
        "ArrowLeft": 2,
        "ArrowDown": 1,
        "PageUp": 2,
    }
    for key, step in keys.items():
        page.keyboard.press(key)
        page.locator(".notice .status", has_text=re.compile(rf"rollouts? of .* at step {step}\.")).wait_for()
        assert number.inner_text() == f"{step} of 4"
    page.keyboard.press("x")
    assert slider.evaluate("node => node === document.activeElement")
    assert page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length") == 1
    assert nameless(page, ".refine-panel") == []
    assert unreadable(page, ".refine-panel") == {}
    take_shots(page, "finished")


def test_no_page_error_and_nothing_from_elsewhere(monitored: Monitored) -> None:
    assert monitored.lab.errors == []
    assert monitored.lab.foreign == []
