"""The live curves in JupyterLab, in Chromium: drawn, growing, reloaded, read by keyboard; nothing from elsewhere."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from refine_lab.config import TrainConfig
from refine_lab.runs.writer import RunWriter
from tests.support.lab import Notebook, opened, take_shots, write_notebook

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

pytestmark = pytest.mark.browser

NASTY = "<img src=x onerror=window.hacked=1></script> failed"

CELLS = (
    "from widgets.parts.live_curves import LiveCurves\n"
    "from widgets.figures.plots import use_offline_renderer\nuse_offline_renderer()",
    "live = LiveCurves({runs})\nlive",
    "live.figure()",
)


@dataclass(kw_only=True)
class Live(Notebook):
    """A notebook with live curves of three runs, and the run that grows."""

    growing: RunWriter


def write_run(
    folder: Path, method: str, steps: int, *, state: str, error: str | None = None, seed: int = 0
) -> RunWriter:
    refine = {"refine": None} if method == "sft" else {}
    config = TrainConfig(recipe="tiny", steps=20, batch_size=2, mini_batch_size=2, seed=seed, **refine)
    writer = RunWriter.create(config, folder)
    writer.evaluation(0, {"ntp_loss": 3.2, "ntp_accuracy": 0.3, "sampled_accuracy": 0.2})
    for step in range(1, steps + 1):
        write_step(writer, step)
    writer.status(state, error=error, tokens_per_second=5000.0, seconds_left=60.0)  # type: ignore[arg-type]
    return writer


def write_step(writer: RunWriter, step: int) -> None:
    line = {"ntp_loss": 3 - step / 20, "ntp_accuracy": 0.3 + step / 100, "grad_norm": 1.0, "tokens_per_second": 5000.0}
    if writer.config.refine:
        line |= {"cosine_mean": 0.5, "cosine_std": 0.2, "binary_mean": 0.3, "binary_std": 0.2, "clip_fraction": 0.01}
    writer.train(step, line)


def hold_lock(writer: RunWriter) -> int:
    """As a training process does: without it a run that says `running` counts as killed."""
    lock = os.open(writer.path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("lab")
    finished = write_run(folder / "runs", "sft", 20, state="finished")
    failed = write_run(folder / "runs", "sft", 0, state="failed", error=NASTY, seed=1)
    growing = write_run(folder / "runs", "refine", 5, state="running")
    lock = hold_lock(growing)
    paths = [str(writer.path) for writer in (finished, growing, failed)]
    write_notebook(folder / "live.ipynb", [cell.format(runs=paths) for cell in CELLS])
    with opened(folder, "live.ipynb", chromium) as there:
        there.run_all()
        yield Live(lab=there, growing=growing)
    os.close(lock)
    for writer in (finished, failed, growing):
        writer.close()


def paths_of(page: playwright.Page, panel: str) -> list[str]:
    """What is drawn in a panel: the path of each line."""
    found = page.locator(f".live-curves svg[data-panel='{panel}'] path.line")
    found.first.wait_for(state="attached")
    return [item.get_attribute("d") or "" for item in found.all()]


def test_curves_are_drawn_and_grow(lab: Live) -> None:
    sft, refine = paths_of(lab.page, "train:ntp_loss")
    assert len(re.findall("[ML]", sft)) == 20
    assert len(re.findall("[ML]", refine)) == 5
    assert len(paths_of(lab.page, "train:cosine_mean")) == 1
    for step in (6, 7):
        write_step(lab.growing, step)
    lab.page.wait_for_function(
        "document.querySelectorAll(\".live-curves svg[data-panel='train:ntp_loss'] path.line\")[1]"
        ".getAttribute('d').match(/[ML]/g).length === 7"
    )
    box = lab.page.locator(".live-curves svg[data-panel='train:ntp_loss']").bounding_box()
    assert box is not None
    assert box["width"] > 200
    assert box["height"] == pytest.approx(170, abs=1)


def test_progress_and_errors_are_text(lab: Live) -> None:
    text = lab.page.locator(".live-curves .runs").inner_text()
    assert "SFT, seed 0" in text
    assert "step 20/20" in text
    assert NASTY in text
    assert lab.page.evaluate("window.hacked") is None


def test_the_static_figure_is_drawn_offline(lab: Live) -> None:
    lab.page.locator(".jp-OutputArea .js-plotly-plot path.js-line").first.wait_for(state="attached")
    assert lab.page.locator(".js-plotly-plot path.js-line").count() >= 8


def test_the_keyboard_reads_values_out(lab: Live) -> None:
    panel = lab.page.locator(".live-curves svg[data-panel='train:ntp_loss']")
    panel.focus()
    lab.page.keyboard.press("Home")
    lab.page.keyboard.press("ArrowRight")
    lab.page.wait_for_function(
        "document.querySelector(\".live-curves svg[data-panel='train:ntp_loss']\").getAttribute('aria-valuenow') === '1'"
    )
    assert panel.get_attribute("aria-valuetext") == "step 1: SFT: 2.95; REFINE: 2.95"
    assert panel.evaluate("node => node === document.activeElement")  # JupyterLab did not take the keys
    lab.page.keyboard.press("Escape")
    lab.page.wait_for_function(
        "document.querySelector(\".live-curves svg[data-panel='train:ntp_loss']\").getAttribute('aria-valuenow') === '20'"
    )


def test_the_pointer_reads_values_out_in_every_panel(lab: Live) -> None:
    take_shots(lab.page, "lab")
    panel = lab.page.locator(".live-curves svg[data-panel='train:ntp_loss']")
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    assert box is not None
    lab.page.mouse.move(box["x"] + 48 + (box["width"] - 58) / 2, box["y"] + 80)
    lab.page.wait_for_function(
        "[...document.querySelectorAll('.live-curves .unit')].every(node => node.textContent.startsWith('step 10,'))"
    )
    assert panel.get_attribute("aria-valuetext") == "step 10: SFT: 2.5"  # REFINE has not come so far
    lab.page.mouse.move(1, 1)


def test_a_reload_keeps_the_curves(lab: Live) -> None:
    before = paths_of(lab.page, "train:ntp_loss")
    lab.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    lab.page.reload()
    after = paths_of(lab.page, "train:ntp_loss")
    assert [len(re.findall("[ML]", path)) for path in after] == [len(re.findall("[ML]", path)) for path in before]
    write_step(lab.growing, 8)
    lab.page.wait_for_function(
        "document.querySelectorAll(\".live-curves svg[data-panel='train:ntp_loss'] path.line\")[1]"
        ".getAttribute('d').match(/[ML]/g).length === 8"
    )
    take_shots(lab.page, "reloaded")


def test_no_page_error_and_nothing_from_elsewhere(lab: Live) -> None:
    assert lab.lab.errors == []
    assert lab.lab.foreign == []
