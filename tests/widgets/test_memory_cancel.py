"""Cancelling in the memory view, without a page: a reading, a change of the model, and the search for writes."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from refine_lab.explore.client import Worker
from refine_lab.models.hub import SHIPPED
from refine_lab.ttt_config import TTTConfig
from tests.support.page_facts import page_head
from tests.support.refusals import naming
from tests.support.small_document import SECONDS, wait_for, worker
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


def unchanged(view: MemoryView, model: str = "tiny-deltanet") -> None:
    """Asserts that the view shows a model and its document, dimmed, and explains its tokens."""
    assert view.notice.stale and view.exploration.model == view.layers.exploration.model == model
    assert view.fields["model"].error == f"This model is not read: the view below still shows {model} (shipped model)."
    assert view.result.result["model"] == f"{model} (shipped model)" and "effect" in view.token_map.metrics
    view.explain(20).result(SECONDS)
    assert view.target is not None and view.target.position == 19 and view.error == ""
    view.explain().result(SECONDS)


def test_a_model_that_has_not_read_the_document_replaces_nothing(worker: Worker, tmp_path: Path) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    result, field = view.result.result, view.fields["model"]
    asked = view.switch("tiny-lact")
    assert view.notice.stale and view.result.result is result and view.exploration.model == "tiny-deltanet"
    cancelled(view, asked)
    position = len(view.exploration._known.token_ids) - 1
    told = (
        f"Cancelled. Still shown: log p of “·width” after token {position}, of the model tiny-deltanet (shipped model)."
    )
    assert view.notice.status == told and field.value == "tiny-lact"
    unchanged(view)

    damaged = tmp_path / "damaged"
    shutil.copytree(SHIPPED / "tiny-deltanet", damaged)
    (damaged / "model.safetensors").write_bytes(b"xx")
    with naming(ValueError, "damaged", "header"):
        view.switch(str(damaged)).result(SECONDS)
    unchanged(view)
    assert "tiny-deltanet" in page_head(view.save_html(tmp_path / "page.html"))[1]["model"]

    field._on_message(field, {"typed": "tiny-lact"}, [])
    pending = view.shown
    field._on_message(field, {"typed": "tiny-deltanet"}, [])  # the one that is shown ends the change
    assert pending.result(SECONDS) is None and (field.error, view.notice.stale) == ("", False)
    assert view.exploration.model == "tiny-deltanet"
    first, second = view.switch("tiny-lact"), view.switch("tiny-lact")
    first.result(SECONDS)
    second.result(SECONDS)
    assert view.result.result["model"] == "tiny-lact (shipped model)" and (view.error, field.error) == ("", "")
    assert not view.notice.stale


def test_the_page_states_what_made_the_result_and_not_what_was_typed_since(worker: Worker, tmp_path: Path) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    view.fields["answer"].value, view.fields["against"].value = " noon", " ferry"
    view.fields["tokens"].value, view.fields["erased"].value = 3, "5-6"
    stated = page_head(view.save_html(tmp_path / "page.html"))[1]
    assert stated["answer"] == " width"
    assert {"compared with", "tokens explained per click", "tokens to erase"}.isdisjoint(stated)
    view.erase().result(SECONDS)
    view.fields["erased"].value = "9"
    assert page_head(view.save_html(tmp_path / "page.html"))[1]["tokens to erase"] == "5-6"
    view.explain(20).result(SECONDS)
    view.fields["tokens"].value = 1
    stated = page_head(view.save_html(tmp_path / "page.html"))[1]
    assert stated["tokens explained per click"] == "3" and {"answer", "tokens to erase"}.isdisjoint(stated)


def test_effects_of_earlier_weights_are_dimmed_and_no_erasure_is_compared_with_them(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    known, attribution = view.exploration._known, view.attribution
    config = TTTConfig(steps=1, lr=1e-3, refine=None)
    adapted = {"model": "tiny-deltanet", "token_ids": known.token_ids, "config": config}
    worker.call("adapt", on_step=lambda _: None, **adapted)
    try:
        again, view._again = view._again, lambda target: cancel_of(view, again(target))  # between the two requests
        view.follow(known.text, known.token_ids).result(SECONDS)
        assert view.exploration._known.reading.version != known.reading.version
        assert view.attribution is attribution and view.notice.stale
        assert view.notice.status.endswith(", with the weights before they changed.")
        view.fields["erased"].value = "5-6"
        for act in (view.erase, view.save_state):
            with naming(ValueError, "weights have changed"):
                act().result(SECONDS)
        assert view.erasures == [] and len(view.result.result["columns"]) == 1
        view.read().result(SECONDS)
        assert view.attribution is not attribution and not view.notice.stale
        view.mark([5, 6])
        view.erase().result(SECONDS)
        assert len(view.erasures) == 1
    finally:
        worker.call("reset", model="tiny-deltanet")


def cancel_of(view: MemoryView, asked: Future[Any]) -> Future[Any]:
    view.cancel()
    return asked


def test_what_is_restored_or_undone_is_not_overridden_by_a_pending_erasure(worker: Worker, tmp_path: Path) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    view.mark([5, 6])
    asked = view.erase()
    view.restore()
    assert (view.buttons["erase"].icon, view.notice.status) == ("", "")
    asked.result(SECONDS)
    assert view.erasures == [] and len(view.result.result["columns"]) == 1 and view.fields["erased"].value == ""
    view.mark([5])
    view.erase().result(SECONDS)
    view.mark([9])
    asked = view.erase()
    view.undo()  # the same, whether the second erasure has arrived or not
    asked.result(SECONDS)
    assert [erasure.erased for erasure in view.erasures] == [(5,)] and view.fields["erased"].value == "5"
    first, second = view.erase(), view.erase()
    first.result(SECONDS)
    second.result(SECONDS)
    assert len(view.erasures) == 2 and view.buttons["erase"].icon == ""
    view.undo()
    view.undo()
    assert view.erasures == []

    path = tmp_path / "state.safetensors"
    asked = view.save_state(path)
    requests = [*view._requests]
    view.cancel()
    assert asked.result(SECONDS) is None
    wait(requests, SECONDS)
    assert path.exists() == ("already been saved" in view.notice.status)


def test_a_click_on_the_same_token_explains_it_again(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    view.token_map.selected = 20
    wait_for(lambda: view.target is not None and view.target.position == 19)
    view.explain().result(SECONDS)
    view.fields["tokens"].value = 2
    view.token_map._handle_custom_msg({"again": True}, [])  # as the page sends it
    wait_for(lambda: view.target is not None and view.target.position == 19)
    assert view.target is not None and len(view.target.token_ids) == 2


def test_an_invalid_click_leaves_the_valid_one_that_is_pending(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    asked = view.explain(20)
    with naming(ValueError, "the token to explain"):
        view.explain(0).result(SECONDS)
    asked.result(SECONDS)
    assert view.target is not None and view.target.position == 19


def test_a_closed_view_leaves_the_worker_to_others(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    asked = view.read(LONG)
    time.sleep(0.5)  # within the reading
    began = time.monotonic()
    view.close()
    assert asked.result(SECONDS) is None
    worker.call("open", model="tiny-deltanet")
    assert time.monotonic() - began < 5
