"""The pictures of docs/workbench.md, taken in JupyterLab in Chromium, light; nothing is drawn or retouched.

    python -m benchmarks.screenshots --folder docs/images

Opens `notebooks/explore.ipynb` as it is and clicks a token, erases a write, adapts a panel to its sample document, trains two
short runs and shows them in the monitor. Chromium is the one on the path, or that of the environment variable CHROMIUM.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

from benchmarks.jupyterlab import ROOT, Lab, opened, write_notebook
from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.runs import create_runs
from refine_lab.runs.queue import run_in_turn

PANEL = """from widgets.ttt_panel import TTTPanel
panel = TTTPanel()
panel"""
MONITOR = """from widgets.run_monitor import RunMonitor
monitor = RunMonitor("runs")
monitor"""
MEMORY = """from widgets.memory_view import MemoryView
view = MemoryView(answer=" width")
view"""
STEPS = 12
"""Of each run that the monitor shows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"), help="where the pictures go")
    folder = parser.parse_args().folder
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        raise SystemExit("there is no Chromium on the path: install it, or name it in CHROMIUM")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shutil.copy(ROOT / "notebooks" / "explore.ipynb", work)
        write_notebook(work / "ttt.ipynb", [PANEL])
        write_notebook(work / "memory.ipynb", [MEMORY])
        write_notebook(work / "monitor.ipynb", [MONITOR])
        (work / "runs").mkdir()
        configs = method_configs(
            "midtrain", [0], steps=STEPS, batch_size=2, sequence_length=256, num_chunks=4, eval_every=4
        )
        run_in_turn(create_runs(configs, work / "runs"), detach=False)
        with opened(work, "explore.ipynb", chromium) as lab:
            lab.page.set_viewport_size({"width": 1200, "height": 2600})  # a widget as a whole
            lab.page.evaluate("() => void window.jupyterapp.commands.execute('application:toggle-left-area')")
            explorer(lab, folder)
            readme(lab, folder)
            memory(lab, folder)
            ttt(lab, folder)
            monitor(lab, folder)
            if lab.errors:
                raise SystemExit(f"the page went wrong: {lab.errors[0]}")


def explorer(lab: Lab, folder: Path) -> None:
    """The notebook as it opens, and each widget after a click on a token."""
    lab.run_all()
    said(lab, "64 rollouts at 8 sampled positions")
    lab.page.locator(".state-view .strongest li").first.wait_for()
    lab.page.wait_for_timeout(1500)  # curves and maps are painted
    lab.page.locator(".token-map").first.scroll_into_view_if_needed()
    shot(lab, ".token-map", folder / "token_map.png")
    shot(lab, ".reward-summary", folder / "reward_summary.png")
    canvas = lab.page.locator(".token-map canvas.text").first
    canvas.click(position={"x": 260, "y": 218})  # in a line of the sample without a sampled position
    said(lab, "8 rollouts at 1 clicked position")
    shot(lab, ".jp-OutputArea-output:has(.token-map)", folder / "reward_explorer.png")
    shot(lab, ".rollout-inspector", folder / "rollout_inspector.png")
    shot(lab, ".state-view", folder / "state_view.png")


def readme(lab: Lab, folder: Path) -> None:
    """The upper part of the explorer after the click, in a window as wide as the README's text."""
    lab.page.mouse.move(5, 5)  # no tooltip
    lab.page.set_viewport_size({"width": 1000, "height": 2600})
    lab.page.locator(".token-map canvas.text").first.scroll_into_view_if_needed()
    lab.page.wait_for_timeout(1500)
    box = lab.page.locator(".jp-OutputArea-output:has(.token-map)").first.bounding_box()
    assert box is not None
    path = folder / "explorer.png"
    lab.page.screenshot(path=path, clip={**box, "height": min(box["height"], 860)})
    print(path)
    lab.page.set_viewport_size({"width": 1200, "height": 2600})


def memory(lab: Lab, folder: Path) -> None:
    """The sample document's answer, with and without its strongest write."""
    lab.open("memory.ipynb")
    lab.run_all()
    lab.page.locator(".memory-result h3").wait_for(timeout=300_000)
    lab.page.get_by_role("button", name="Mark the strongest write").click()
    lab.page.locator(".token-map .legend:visible", has_text="marked to erase").first.wait_for()
    lab.page.get_by_role("button", name="Erase", exact=True).click()
    lab.page.locator(".memory-result .change", has_text="Without").wait_for()
    shot(lab, ".jp-OutputArea-output:has(.token-map)", folder / "memory_view.png")


def ttt(lab: Lab, folder: Path) -> None:
    """The panel after a comparison of its methods."""
    lab.open("ttt.ipynb")
    lab.run_all()
    lab.page.get_by_role("button", name="Compare methods").click()
    said(lab, "^After .* steps each: loss")
    lab.page.locator(".widget-label", has_text="Adapted").wait_for()
    shot(lab, ".jp-OutputArea-output:has(.token-map)", folder / "ttt_panel.png")


def monitor(lab: Lab, folder: Path) -> None:
    """Two runs that have ended, and the rollouts of the last step."""
    lab.open("monitor.ipynb")
    lab.run_all()
    said(lab, f"rollouts of .* at step {STEPS}")
    shot(lab, ".jp-OutputArea-output:has(.live-curves)", folder / "run_monitor.png")


def said(lab: Lab, words: str) -> None:
    """Wait until a status line of the notebook in front holds the words."""
    lab.page.locator(".notice .status:visible").filter(has_text=re.compile(words)).first.wait_for(timeout=300_000)


def shot(lab: Lab, selector: str, path: Path) -> None:
    """A picture of the first visible element, once it stands still."""
    element = lab.page.locator(f"{selector}:visible").first
    element.scroll_into_view_if_needed()
    lab.page.wait_for_timeout(800)
    element.screenshot(path=path)
    print(path)


if __name__ == "__main__":
    main()
