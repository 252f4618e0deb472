"""Every hostile document through the panels, with a real worker: once, for all the tests that look at what came of it."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hostile import HOSTILE

from refine_lab.explore import Worker
from widgets.reward_explorer import RewardExplorer
from widgets.ttt_panel import TTTPanel

SECONDS = 300
ADAPTED = ("end of script", "turned direction", "lone surrogates")
"""Documents that are adapted to as well, each of them its own question."""
SETTINGS = {"group_size": 2, "num_chunks": 2}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a panel made of a document."""

    text: str
    "That its map shows."
    raised: BaseException | None
    error: str
    told: str
    "Its text/plain."
    page: str
    "Its offline page."


@cache
def explored() -> dict[str, Shown]:
    """By the name of the document what the reward explorer shows, and for `ADAPTED`, as "adapt: <name>", the other panel."""
    worker = Worker("cpu")
    try:
        found = {}
        for name, document in HOSTILE:
            explorer = RewardExplorer(text=document, worker=worker, settings=SETTINGS)
            found[name] = _shown(explorer, explorer.shown)
        for name in ADAPTED:
            panel = TTTPanel(text=dict(HOSTILE)[name], question=dict(HOSTILE)[name], worker=worker)
            panel.fields["steps"].value = 1
            found[f"adapt: {name}"] = _shown(panel, panel.start())
            panel.reset().result(SECONDS)
        return found
    finally:
        worker.close()


def _shown(panel: RewardExplorer | TTTPanel, done: Future[Any]) -> Shown:
    raised = done.exception(SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        page = panel.save_html(Path(folder) / "panel.html").read_text(encoding="utf-8")
    return Shown(text=panel.token_map.text.text, raised=raised, error=panel.error, told=repr(panel), page=page)
