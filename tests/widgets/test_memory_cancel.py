"""Cancelling in the memory view, without a page: a reading, a change of the model, and the search for writes."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from refine_lab.explore.client import Worker
from tests.support.small_document import SECONDS, worker
from widgets.memory_view import MemoryView

__all__ = ["worker"]

TEXT = "The secret word for hand is width.\n" + "The ferry leaves at noon. " * 12 + "\nThe secret word for hand is"
LONG = "The ferry leaves at noon. " * 4000


def cancelled(view: MemoryView, asked: Future[Any]) -> None:
    """Cancels what takes much longer than this."""
    assert view.notice.busy and not view.cancel_button.disabled
    began = time.monotonic()
    view.cancel()
    assert asked.result(SECONDS) is None
    assert time.monotonic() - began < 10 and view.cancel_button.disabled
    assert (view.error, view.notice.busy) == ("", False)


def test_a_cancelled_reading_leaves_what_is_shown_and_marks_it(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    document, result, values = view.exploration.document, view.result.result, view.token_map.metrics["effect"].values
    assert view.cancel_button.disabled and not view.notice.stale

    asked = view.read(LONG)
    assert view.notice.stale
    time.sleep(0.5)  # within the reading
    cancelled(view, asked)
    assert view.exploration.document is document and view.result.result is result
    assert view.token_map.metrics["effect"].values is values
    position = len(document.token_ids) - 1 if document else 0
    told = f"Cancelled. Still shown: log p of “·width” after token {position}, in the document that was read before."
    assert view.notice.status == told
    assert view.notice.stale, "what is shown is of another document than that in the field"

    view.read(TEXT).result(SECONDS)
    assert not view.notice.stale and view.notice.status == ""
    view.fields["answer"].value = " ferry"
    asked = view.explain()
    cancelled(view, asked)
    assert view.result.result["question"].startswith("log p of “·width”") and view.notice.stale
    view.explain().result(SECONDS)
    assert view.result.result["question"].startswith("log p of “·ferry”") and not view.notice.stale
    view.explain(20).result(SECONDS)
    view.fields["answer"].value = " noon"  # which is not what is explained
    cancelled(view, view.explain(21))
    assert view.target is not None and view.target.position == 19 and not view.notice.stale


def test_nothing_of_another_model_stays_after_a_cancelled_change(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    cancelled(view, view.switch("tiny-lact"))
    assert view.exploration.model == view.fields["model"].value == "tiny-lact"
    assert (len(view.token_map.text), view.result.result, view.target) == (0, {}, None)
    assert view.notice.status == "Cancelled. No document is shown: press Read."
    view.read().result(SECONDS)
    assert view.result.result["model"] == "tiny-lact (shipped model)" and view.error == ""
