"""The live curves in JupyterLab, in Chromium: drawn, growing, reloaded, read by keyboard; nothing from elsewhere."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest

from refine_lab.config import TrainConfig
from refine_lab.records import RunWriter

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
PATIENCE = 40_000
"Milliseconds: two busy cores start a kernel slowly."
TOKEN = "browser-test"
NASTY = "<img src=x onerror=window.hacked=1></script> failed"

CELLS = (
    "from widgets.live_curves import LiveCurves\nfrom widgets.figures import use_offline_renderer\nuse_offline_renderer()",
    "live = LiveCurves({runs})\nlive",
    "live.figure()",
)


@dataclass(kw_only=True)
class Lab:
    """A running JupyterLab, an open notebook in it, and what its page did wrong."""

    page: playwright.Page
    growing: RunWriter
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def write_run(folder: Path, arm: str, steps: int, *, state: str, error: str | None = None) -> RunWriter:
    method = {"method": None} if arm == "sft" else {}
    writer = RunWriter.create(TrainConfig(recipe="tiny", steps=20, batch_size=2, mini_batch_size=2, **method), folder)
    writer.evaluation(0, {"ntp_loss": 3.2, "ntp_accuracy": 0.3, "sampled_accuracy": 0.2})
    for step in range(1, steps + 1):
        write_step(writer, step)
    writer.status(state, error=error, tokens_per_second=5000.0, seconds_left=60.0)  # type: ignore[arg-type]
    return writer


def write_step(writer: RunWriter, step: int) -> None:
    line = {"ntp_loss": 3 - step / 20, "ntp_accuracy": 0.3 + step / 100, "grad_norm": 1.0, "tokens_per_second": 5000.0}
    if writer.config.method:
        line |= {"cosine_mean": 0.5, "cosine_std": 0.2, "binary_mean": 0.3, "binary_std": 0.2, "clip_fraction": 0.01}
    writer.train(step, line)


def hold_lock(writer: RunWriter) -> int:
    """As a training process does: without it a run that says `running` counts as killed."""
    lock = os.open(writer.path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def serve(folder: Path) -> Iterator[str]:
    """JupyterLab on `folder` with settings of its own; its address."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    environ |= {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    environ |= {"IPYTHONDIR": str(folder / "ipython")}
    settings = folder / "lab" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    options = ["--no-browser", "--port=0", "--ip=127.0.0.1", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    options += ["--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={folder / 'lab'}"]
    options += [f"--LabApp.workspaces_dir={folder / 'workspaces'}", f"--ServerApp.root_dir={folder}"]
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environ, stdout=log, stderr=log)
    try:
        yield address_of(server, folder)
    finally:
        server.terminate()
        server.wait(30)


def address_of(server: subprocess.Popen[bytes], folder: Path) -> str:
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline and server.poll() is None:
        for info in (folder / "runtime").glob("jpserver-*.json"):
            return str(json.loads(info.read_text())["url"])
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start:\n" + (folder / "lab.log").read_text()[-2000:])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    finished = write_run(folder / "runs", "sft", 20, state="finished")
    failed = write_run(folder / "runs", "sft", 0, state="failed", error=NASTY)
    growing = write_run(folder / "runs", "refine", 5, state="running")
    lock = hold_lock(growing)
    paths = [str(writer.path) for writer in (finished, growing, failed)]
    cells = [nbformat.v4.new_code_cell(cell.format(runs=paths)) for cell in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "live.ipynb")
    server = serve(folder)
    address = next(server)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        page.set_default_timeout(PATIENCE)
        opened = Lab(page=page, growing=growing)
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on("request", lambda request: note_foreign(opened, request.url, address))
        page.goto(f"{address}lab/tree/live.ipynb?token={TOKEN}")
        page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        yield opened
        browser.close()
    server.close()
    os.close(lock)
    for writer in (finished, failed, growing):
        writer.close()


def note_foreign(lab: Lab, url: str, address: str) -> None:
    if not url.startswith((address, "data:", "blob:")):
        lab.foreign.append(url)


def paths_of(page: playwright.Page, panel: str) -> list[str]:
    """What is drawn in a panel: the path of each line."""
    found = page.locator(f".live-curves svg[data-panel='{panel}'] path.line")
    found.first.wait_for(state="attached")
    return [item.get_attribute("d") or "" for item in found.all()]


def take_shots(page: playwright.Page, name: str) -> None:
    """Pictures in light and dark, where REFINE_SHOTS names a folder."""
    if folder := os.environ.get("REFINE_SHOTS"):
        for theme in ("Light", "Dark"):
            page.evaluate(
                f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})"
            )
            page.wait_for_selector(f"body[data-jp-theme-light='{str(theme == 'Light').lower()}']", state="attached")
            page.wait_for_timeout(700)
            page.screenshot(path=f"{folder}/{name}_{theme.lower()}.png")


def test_curves_are_drawn_and_grow(lab: Lab) -> None:
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


def test_progress_and_errors_are_text(lab: Lab) -> None:
    text = lab.page.locator(".live-curves .runs").inner_text()
    assert "SFT, seed 0" in text
    assert "step 20/20" in text
    assert NASTY in text
    assert lab.page.evaluate("window.hacked") is None


def test_the_static_figure_is_drawn_offline(lab: Lab) -> None:
    lab.page.locator(".jp-OutputArea .js-plotly-plot path.js-line").first.wait_for(state="attached")
    assert lab.page.locator(".js-plotly-plot path.js-line").count() >= 8


def test_the_keyboard_reads_values_out(lab: Lab) -> None:
    panel = lab.page.locator(".live-curves svg[data-panel='train:ntp_loss']")
    panel.focus()
    lab.page.keyboard.press("Home")
    lab.page.keyboard.press("ArrowRight")
    lab.page.wait_for_function(
        "document.querySelector(\".live-curves svg[data-panel='train:ntp_loss']\").getAttribute('aria-valuenow') === '1'"
    )
    assert panel.get_attribute("aria-valuetext") == "step 1: SFT 2.95; REFINE 2.95"
    assert panel.evaluate("node => node === document.activeElement")  # JupyterLab did not take the keys
    lab.page.keyboard.press("Escape")
    lab.page.wait_for_function(
        "document.querySelector(\".live-curves svg[data-panel='train:ntp_loss']\").getAttribute('aria-valuenow') === '20'"
    )


def test_the_pointer_reads_values_out_in_every_panel(lab: Lab) -> None:
    take_shots(lab.page, "lab")
    panel = lab.page.locator(".live-curves svg[data-panel='train:ntp_loss']")
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    assert box is not None
    lab.page.mouse.move(box["x"] + 48 + (box["width"] - 58) / 2, box["y"] + 80)
    lab.page.wait_for_function(
        "[...document.querySelectorAll('.live-curves .unit')].every(node => node.textContent.startsWith('step 10,'))"
    )
    assert panel.get_attribute("aria-valuetext") == "step 10: SFT 2.5"  # REFINE has not come so far
    lab.page.mouse.move(1, 1)


def test_a_reload_keeps_the_curves(lab: Lab) -> None:
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


def test_no_page_error_and_nothing_from_elsewhere(lab: Lab) -> None:
    assert lab.errors == []
    assert lab.foreign == []
