"""The workbench in JupyterLab in Chromium: milliseconds until something is seen, each beside its bar.

    python -m benchmarks.widgets --json benchmarks/results/widgets.json

A token map of 16,000 and of 64,000 tokens; then the reward explorer with `tiny-deltanet` on 2,000 tokens: a document read, a
click that rolls out eight times near its beginning, middle and end, and another reward of the rollouts that are there.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import REPEATS, arguments, write
from benchmarks.jupyterlab import PATIENCE, Lab, opened, write_notebook

MAP = """import numpy as np
from widgets.token_map import Metric, TokenMap, TokenText
rng = np.random.default_rng(0)
words = rng.choice(["the", " state", " of", " a", " tokens", "matrix", "(x)", ".", " rank"], {tokens})
text = TokenText("".join(words), np.cumsum([0, *map(len, words)]))
metrics = [Metric(name, name, "nats", rng.exponential(size=len(text))) for name in ("first", "second")]"""
SHOW = """shown = TokenMap(text, metrics)
shown.observe(lambda change: shown.set_trait("status", f"Python has {change['new']}"), "selected")
shown"""
EXPLORER = """from widgets.reward_explorer import RewardExplorer
explorer = RewardExplorer()
explorer"""

PAGE = Path(__file__).with_suffix(".js")
"""What is done and looked at in the page."""
BARS = {
    "paint 16,000 tokens": 300,
    "paint 64,000 tokens": 1000,
    "click to Python and back": 60,
    "scroll frame p95": 33,
    "change of metric": 150,
    "2,000 tokens read and shown": 1500,
    "click to eight rollouts": 400,
    "another reward": 100,
}
"""Milliseconds that are allowed."""


def main() -> None:
    chosen = arguments(__doc__, REPEATS, model=None)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        raise SystemExit("there is no Chromium on the path: install it, or name it in CHROMIUM")
    repeats = chosen.repeats or 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tokens in (16_000, 64_000):
            write_notebook(folder / f"map{tokens}.ipynb", [MAP.format(tokens=tokens), SHOW])
        write_notebook(folder / "explorer.ipynb", [EXPLORER])
        with opened(folder, "map16000.ipynb", chromium, OMP_NUM_THREADS=str(chosen.threads)) as lab:
            times = measured(lab, repeats)
    figures = {}
    for name, values in times.items():
        middle = statistics.median(values)
        figures[name] = {"median": middle, "min": min(values), "max": max(values), "bar": BARS[name]}
        print(f"{name:>30}: {middle:7.1f} ms ({min(values):.1f} to {max(values):.1f}), bar {BARS[name]} ms")
    write(chosen.json, {"milliseconds": figures}, repeats=repeats)


def measured(lab: Lab, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of everything in `BARS`."""
    lab.page.add_script_tag(content=PAGE.read_text(encoding="utf-8"))
    times = {"paint 16,000 tokens": [painted(lab)]}
    places = [[100 + 40 * (turn % 10), 20 + 30 * (turn % 7)] for turn in range(repeats)]
    times["click to Python and back"] = [until(lab, "click", "answer", place) for place in places]
    times["scroll frame p95"] = [lab.page.evaluate("window.bench.scroll()") for _ in range(3)]
    times["change of metric"] = [until(lab, "choose", "map", name) for name in ["second", "first"] * 3]
    lab.open("map64000.ipynb")
    times["paint 64,000 tokens"] = [painted(lab)]
    lab.open("explorer.ipynb")
    return times | explored(lab)


def explored(lab: Lab) -> dict[str, list[float]]:
    """Of the explorer: a document read, rollouts at a click, and another reward, all as the page tells of them."""
    lab.run_all()
    status = lab.page.locator(".notice .status")
    status.filter(has_text="rollouts at 8 sampled positions").wait_for()
    reads, clicks = [], []
    box = lab.page.locator("textarea").first
    for turn in range(3):
        box.fill(f"turn {turn}\n" + box.input_value())
        box.press("Tab")
        reads.append(until(lab, "press", "read", "Read"))
        status.filter(has_text="rollouts at 8 sampled positions").wait_for()
    canvas = lab.page.locator(".token-map canvas.text").last
    canvas.scroll_into_view_if_needed()
    for keys in (["Control+Home", *["ArrowDown"] * 3], ["PageDown"] * 3, ["Control+End", *["ArrowUp"] * 3]):
        canvas.focus()
        for key in keys:  # near the beginning, further on, and near the end of the document
            lab.page.keyboard.press(key)
        lab.page.wait_for_timeout(500)
        clicks.append(until(lab, "enter", "rollouts", None))
    rewards = [until(lab, "choose", "rollouts", reward) for reward in ["hybrid", "binary", "cosine"] * 3]
    return {"2,000 tokens read and shown": reads, "click to eight rollouts": clicks, "another reward": rewards}


def painted(lab: Lab) -> float:
    """From running the notebook's second cell to the first paint of its map; the first has made the data."""
    lab.page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0")
    lab.page.evaluate("window.jupyterapp.commands.execute('notebook:run-cell')")
    lab.page.wait_for_timeout(500)
    lab.wait_for_kernel()
    return until(lab, "run", "map", 1)


def until(lab: Lab, act: str, seen: str, argument: Any) -> float:
    """Milliseconds from doing something in the page to the first frame in which something new is seen."""
    call = "([act, seen, argument, patience]) => window.bench.until(act, seen, argument, patience)"
    found = lab.page.evaluate(call, [act, seen, argument, PATIENCE])
    if found is None:
        raise RuntimeError(
            f"{act} {argument}: nothing new of {seen!r} within {PATIENCE / 1000:.0f} s; {lab.errors[:1]}"
        )
    return float(found)


if __name__ == "__main__":
    main()
