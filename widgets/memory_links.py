"""Memory views that follow another panel: why a rollout was made, and what adapting changes in the use of the memory."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary, ref

from widgets.memory_view import MemoryView
from widgets.token_map import token_text

_VIEWS: WeakKeyDictionary[Any, ref[MemoryView]] = WeakKeyDictionary()
"""The view that follows each panel."""


def memory_of_explorer(explorer: Any) -> MemoryView:
    """Returns a view of a `RewardExplorer`'s document that explains the rollout which is selected there.

    It follows the explorer until it is closed or another view follows it.
    """
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

    _replace(explorer, view)
    view.observe_other(explorer.token_map, follow, "document")
    view.observe_other(explorer.inspector, explain, "selected")
    follow()
    return view


def memory_of_ttt(panel: Any) -> MemoryView:
    """Returns a view of a `TTTPanel`'s prompt that explains the answer, again whenever the weights have changed.

    Under other weights the map also shows the change of each write's effect. It follows the panel until it is closed or
    another view follows it.
    """
    exploration = panel.exploration
    view = MemoryView(panel.model, "", worker=panel.worker, add_bos=exploration.add_bos, read=False)

    def follow(_: Any = None) -> None:
        ids = getattr(panel, "_ids", None)
        if ids is not None and not panel.running:
            view.shown = view.follow(token_text(exploration.tokenizer, ids).text, ids)

    _replace(panel, view)
    view.observe_other(panel.token_map, follow, "document")
    view.observe_other(panel, follow, "weights_seen")
    follow()
    return view


def _replace(panel: Any, view: MemoryView) -> None:
    """Ends the following of the panel's earlier view, so that a cell that is run again does no work twice."""
    earlier = _VIEWS[panel]() if panel in _VIEWS else None
    _VIEWS[panel] = ref(view)
    if earlier is not None:
        earlier.end_following()
        earlier.report("This view no longer follows its panel: a newer view does.")
