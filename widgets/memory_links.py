"""Memory views that follow another panel: why a rollout was made, and what adapting changes in the use of the memory."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from widgets.memory_view import MemoryView
from widgets.token_map import token_text


def memory_of_explorer(explorer: Any) -> MemoryView:
    """Returns a view of a `RewardExplorer`'s document that explains the rollout which is selected there."""
    exploration = explorer.exploration
    view = MemoryView(exploration.model, "", worker=exploration.worker, add_bos=exploration.add_bos, read=False)
    followed: list[Any] = [None]

    def follow(_: Any = None) -> None:
        document = exploration.document
        if document is not None and document is not followed[0]:
            followed[0] = document
            view.shown = view.follow(document.text, document.token_ids)

    def explain(change: Any) -> None:
        document, row = exploration.document, change["new"]
        if row < 0 or document is None:
            return
        rollout = explorer.inspector.rollouts.iloc[row]
        position, ids = int(rollout["position"]), [int(token) for token in rollout["rollout_ids"]]

        def begin(_: Future[Any]) -> None:
            if document is exploration.document:
                view.shown = view.explain_continuation(position, ids)

        view.shown.add_done_callback(begin)

    explorer.token_map.observe(follow, "document")
    explorer.inspector.observe(explain, "selected")
    follow()
    return view


def memory_of_ttt(panel: Any) -> MemoryView:
    """Returns a view of a `TTTPanel`'s prompt that explains the answer, again whenever the weights have changed.

    Under other weights the map also shows the change of each write's effect.
    """
    exploration = panel.exploration
    view = MemoryView(panel.model, "", worker=panel.worker, add_bos=exploration.add_bos, read=False)

    def follow(_: Any = None) -> None:
        ids = getattr(panel, "_ids", None)
        if ids is not None and not panel.running:
            view.shown = view.follow(token_text(exploration.tokenizer, ids).text, ids)

    panel.token_map.observe(follow, "document")
    panel.observe(follow, "weights_seen")
    follow()
    return view
