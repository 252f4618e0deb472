"""Every hostile document through the panels, with a real worker: once, for all the tests that look at what came of it."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refine_lab.explore.client import Worker
from tests.support.hostile import HOSTILE
from widgets.memory_view import MemoryView
from widgets.reward_explorer import RewardExplorer
from widgets.side_by_side import SideBySide
from widgets.state_view import StateView
from widgets.ttt_panel import TTTPanel

SECONDS = 300
Panel = RewardExplorer | TTTPanel | MemoryView | SideBySide
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
    """By the name of the document what the reward explorer shows, and as "read: <name>" the other panel.

    For `ADAPTED` also that panel after a step, as "adapt: <name>", a view of the states, as "states: <name>", a view of the
    memory after an erasure, as "memory: <name>", and the model beside itself, as "side: <name>".
    """
    worker = Worker("cpu")
    try:
        found = {}
        for name, document in HOSTILE:
            explorer = RewardExplorer(text=document, worker=worker, settings=SETTINGS)
            found[name] = _shown(explorer, explorer.shown)
            panel = TTTPanel(text=document, worker=worker)
            panel.shown.exception(SECONDS)
            found[f"read: {name}"] = _shown(panel, panel.read())
            if name in ADAPTED:
                found[f"states: {name}"] = _states(explorer)
                found[f"memory: {name}"] = _memory(document, worker)
                side = SideBySide("tiny-deltanet", "tiny-deltanet", document, worker=worker)
                found[f"side: {name}"] = _shown(side, side.shown)
        for name in ADAPTED:
            panel = TTTPanel(text=dict(HOSTILE)[name], question=dict(HOSTILE)[name], worker=worker)
            panel.fields["steps"].value = 1
            found[f"adapt: {name}"] = _shown(panel, panel.start())
            panel.reset().result(SECONDS)
        return found
    finally:
        worker.close()


def _states(explorer: RewardExplorer) -> Shown:
    view = explorer.state_view()
    raised = view.shown.exception(SECONDS)
    text = explorer.token_map.text.text
    return Shown(text=text, raised=raised, error=view.error, told=repr(view), page=_page(view))


def _memory(document: str, worker: Worker) -> Shown:
    """The document itself is the answer that is explained."""
    view = MemoryView(text=document, answer=document, worker=worker)
    view.shown.result(SECONDS)
    view.mark_strongest()
    view.erase().result(SECONDS)
    view.rollouts.roll_out().result(SECONDS)
    return _shown(view, view.layers.lens())


def _page(shown: Panel | StateView) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return shown.save_html(Path(folder) / "page.html").read_text(encoding="utf-8")


def _shown(panel: Panel, done: Future[Any]) -> Shown:
    raised = done.exception(SECONDS)
    return Shown(text=panel.token_map.text.text, raised=raised, error=panel.error, told=repr(panel), page=_page(panel))
