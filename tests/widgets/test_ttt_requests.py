"""Requests of the TTT panel that are stopped or edited before they begin, and the death of the worker."""

from __future__ import annotations

import json
import os
import re
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from refine_lab.explore.client import Worker
from refine_lab.ttt_config import TTTConfig
from tests.support.small_document import SECONDS, TEXT, wait_for, worker  # noqa: F401
from widgets.ttt_panel import TTTPanel

pytestmark = pytest.mark.process

MODEL = "tiny-deltanet"


def occupied(worker: Worker, panel: TTTPanel) -> Future[Any]:
    """Returns a request of another panel, during which the worker begins no other."""
    ids = panel.exploration.tokens_of(TEXT)
    return worker.submit("rollouts", model=MODEL, token_ids=ids, positions=[*range(20, 80)], n=64, k=64)


def stopped_before_its_first_step(panel: TTTPanel, start: Any) -> None:
    """Stops when the adaptation is requested and the worker is still occupied by another request."""
    busy: list[Future[Any]] = []

    def drawn(_: Any) -> None:  # just before the adaptation is requested
        panel.curves.unobserve(drawn, "curves")
        busy.append(occupied(panel.worker, panel))

    panel.curves.observe(drawn, "curves")
    chain = start()
    wait_for(lambda: panel._job is not None or chain.done())
    panel.stop()
    assert panel.notice.status == "Stopping after this step…"
    panel.worker.cancel(busy[0])
    chain.result(SECONDS)


def test_a_stop_before_the_first_step_credits_no_method(worker: Worker) -> None:
    panel = TTTPanel(text=TEXT, worker=worker, config=TTTConfig(steps=1, lr=1e-3, refine=None))
    panel.shown.result(SECONDS)
    stopped_before_its_first_step(panel, lambda: panel.compare(["SFT", "REFINE"]))
    assert (panel.results, panel.result.results, panel.error) == ({}, [], "")
    panel.start().result(SECONDS)
    rest = panel.rest
    busy = occupied(worker, panel)
    panel.fields["method"].value = "REFINE"
    chain = panel.start("original")
    panel.stop()
    assert panel.notice.status == "Stopping…"
    worker.cancel(busy)
    assert chain.result(SECONDS) is None
    assert panel.notice.status.startswith("Stopped before the first step: the weights and what is shown have not")
    assert ([*panel.results], panel.rest) == (["SFT"], rest)
    stopped_before_its_first_step(panel, lambda: panel.start("original"))
    assert panel.notice.status == "Stopped before the first step: the weights have not changed."
    assert (panel.results, panel.result.results, panel.answers.keys()) == ({}, [], {"before"})
    assert panel.curves.curves["panels"] == []
    state = worker.call("open", model=MODEL)
    assert (state["updates"], state["methods"], state["kept"]) == (1, ["sft"], [])
    panel.reset().result(SECONDS)


def test_edits_after_start_change_neither_the_adaptation_nor_its_page(worker: Worker, tmp_path: Path) -> None:
    config = TTTConfig(steps=1, lr=1e-3, refine=None)
    panel = TTTPanel(text=TEXT, question="area", reference="(width", worker=worker, config=config)
    panel.shown.result(SECONDS)
    expected = panel.exploration.tokens_of(TEXT + "area")
    for begin in (panel.ask, lambda: panel.start("original")):
        busy = occupied(worker, panel)
        chain = begin()
        edits = {"document": "no", "question": "?", "method": "REFINE", "steps": 99, "lr": 0.5, "held_out": 10}
        before = {name: panel.fields[name].value for name in edits}
        assert not panel.notice.stale
        for name, value in (edits | {"answer_tokens": 3}).items():
            panel.fields[name].value = value
        worker.cancel(busy)
        chain.result(SECONDS)
        assert panel.notice.stale, "the fields are no longer those of the result"
        assert panel.prompt is not None and panel.prompt.ids.tolist() == expected.tolist()
        assert panel.prompt.held is not None and panel.prompt.rule.max_tokens == 32
        ((label, made),) = panel.results.items()
        assert (label, made.made, made.config) == ("SFT", 1, config)
        page = panel.save_html(tmp_path / "page.html").read_text("utf-8")
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
        facts = {name: str(value) for name, value in json.loads(data)["head"]["facts"]}
        own = {name: facts[name] for name in ("method", "steps", "lr", "Question", "max answer tokens")}
        assert own == {"method": "SFT", "steps": "1", "lr": "0.001", "Question": "area", "max answer tokens": "32"}
        assert facts["Held-out remainder"] == "33"
        for name, value in (before | {"reference": "(width", "answer_tokens": 32}).items():
            panel.fields[name].value = value
    panel.reset().result(SECONDS)


def test_weights_that_died_with_the_worker_are_not_shown_as_adapted(worker: Worker) -> None:
    panel, other = (TTTPanel(text=TEXT, worker=worker, config=TTTConfig(steps=1, lr=1e-3)) for _ in range(2))
    panel.compare(["SFT", "REFINE"]).result(SECONDS)
    for each in (panel, other):
        wait_for(lambda each=each: not each.buttons["save"].disabled)
    seen = other.weights_seen
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    for each in (panel, other):
        wait_for(lambda each=each: "adapted weights are lost" in each.error)
        assert each.fields["weights"].value == "Original weights." and each.buttons["save"].disabled
        assert [value for _, value in each.fields["saved"].options] == [""]
    assert other.weights_seen == seen + 1 and worker.pid is None
    assert panel.reset().result(SECONDS) == 0
