"""The memory view without a page: clicks, heads, erasing, undo and what follows, against the functions of the core."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refine_lab.explore.attribution import WriteAttribution, write_attribution
from refine_lab.explore.client import Worker
from refine_lab.explore.targets import Target
from refine_lab.models import FastWeightLM, State, load_model
from refine_lab.ttt_config import TTTConfig
from tests.support.refusals import naming, refused
from tests.support.small_document import SECONDS, wait_for, worker
from widgets.memory_view import MemoryView
from widgets.parts.memory_grid import MemoryGrid
from widgets.parts.memory_metrics import listed, tokens_in
from widgets.reward_explorer import RewardExplorer
from widgets.ttt_panel import TTTPanel

__all__ = ["worker"]

TEXT = "The key of the door is red.\nThe secret word for hand is width.\n" + "The ferry leaves at noon. " * 12
TEXT += "\nWhat is the secret word for hand? The secret word for hand is"
CELLS = [(3, "recurrent_state", 0), (1, "recurrent_state", 1)]


@pytest.fixture(scope="module")
def view(worker: Worker) -> MemoryView:
    view = MemoryView(text=TEXT, answer=" width", against=" block", worker=worker)
    view.shown.result(SECONDS)
    return view


def attributed(view: MemoryView, target: Target) -> WriteAttribution:
    policy, _ = load_model("tiny-deltanet", device="cpu")
    return write_attribution(policy, torch.from_numpy(view.exploration._known.token_ids).long(), target)


def strongest_of(view: MemoryView) -> list[dict[str, Any]]:
    return view.result.result["strongest"]


def metric(view: MemoryView, name: str) -> np.ndarray:
    return view.token_map.metrics[name].values


def test_the_answer_and_its_contrast_are_explained_first(view: MemoryView) -> None:
    ids = view.exploration._known.token_ids
    width, block = (tuple(view.exploration.tokenizer(text)["input_ids"][-1:]) for text in (" width", " block"))
    target = Target(position=len(ids) - 1, token_ids=width, against=block)
    assert view.target == target
    assert view.token_map.metric == "signed"  # two colours
    assert view.token_map.metrics["signed"].ends == ("lowers contrast", "raises contrast")
    core = attributed(view, target)
    np.testing.assert_allclose(metric(view, "effect"), core.by_token(), atol=1e-4)
    assert view.prediction is not None
    assert view.prediction.value == pytest.approx(core.value, abs=1e-4)
    strongest = [write["token"] for write in view.result.result["strongest"]]
    assert strongest == core.top(12)
    signed, sizes = core.signed(), core.by_token()  # what the line under the text shows, and what orders the list
    told = [(float(write["effect"].split()[0].replace("−", "-")), float(write["size"])) for write in strongest_of(view)]
    np.testing.assert_allclose(told, [(signed[token], sizes[token]) for token in strongest], atol=0.0051)
    assert view.result.result["context"] == "After “…What is the secret word for hand? The secret word for hand is”:"
    assert "retained" not in view.token_map.metrics  # the delta rule has no gate


def test_a_click_explains_that_token_and_heads_restrict_it(view: MemoryView) -> None:
    token = 40
    view.fields["tokens"].value = 2
    view.token_map.selected = token
    view.explain(token).result(SECONDS)
    ids = view.exploration._known.token_ids
    target = Target(position=token - 1, token_ids=tuple(ids[token : token + 2].tolist()))
    assert view.target == target
    core = attributed(view, target)
    np.testing.assert_allclose(metric(view, "effect")[:token], core.by_token(), atol=1e-4)
    assert np.isnan(metric(view, "effect")[token:]).all()
    np.testing.assert_allclose(view.grid.values, core.by_cell(), rtol=1e-3)
    view.grid.chosen = [[3, 0], [1, 1]]
    assert sorted(view.grid.cells or []) == sorted(CELLS)
    np.testing.assert_allclose(metric(view, "signed")[:token], core.signed(CELLS), atol=1e-4)
    assert view.result.result["listed"] == "Strongest writes in layer 1 state head 1, layer 3 state head 0"
    view.choose(None)
    np.testing.assert_allclose(metric(view, "effect")[:token], core.by_token(), atol=1e-4)
    view.fields["tokens"].value = 1


def test_erasing_compares_and_undo_goes_back_step_by_step(view: MemoryView, worker: Worker, tmp_path: Path) -> None:
    view.explain().result(SECONDS)
    core = view.attribution
    assert core is not None and view.target is not None
    view.mark_strongest()
    (top,) = core.top(1)
    first = tuple(range(top - 1, top + 2))
    assert view.fields["erased"].value == listed(first)
    view.erase().result(SECONDS)
    asked = {"model": "tiny-deltanet", "token_ids": view.exploration._known.token_ids, "target": view.target}
    expected = worker.call("erase", erased=first, **asked)
    (erasure,) = view.erasures
    assert erasure.after.value == expected.after.value < erasure.before.value - 1
    np.testing.assert_array_equal(metric(view, "loss_change"), expected.losses_after - expected.losses_before)
    before, after = view.result.result["columns"]
    assert [before["facts"][0][0], after["title"]] == ["contrast", "Without the erased writes"]
    rest = expected.losses_after[first[0] + 1 :].mean()
    label = f"mean next-token loss after token {first[0]} (the first erased one)"
    assert [label, f"{rest:.4f} nats"] in after["facts"]
    predicted = -core.signed()[list(first)].sum()
    told = f"This is exact. The effects of the writes, which are gradients, predict {predicted:+.2f}: they are a local "
    told += "approximation, so trust the erasure where the two differ."
    assert told.replace("-", "−") in view.result.result["change"].replace("-", "−")

    view.token_map.highlight = [5, 6]  # as by dragging, which may be to copy text
    assert view.fields["erased"].value == listed(first)
    view.mark_highlighted()
    assert view.fields["erased"].value == listed((*first, 5, 6))
    view.mark([5, 6])
    view.choose(CELLS[:1])
    view.erase().result(SECONDS)
    assert [each.erased for each in view.erasures] == [first, (5, 6)]
    assert view.erasures[1].cells == (CELLS[0],)
    path = view.save_state(tmp_path / "edited.safetensors").result(SECONDS)
    saved = State.load(path)
    assert int(saved.lengths) == view.target.position + 1
    plain = worker.call("save_state", position=view.target.position, path=str(tmp_path / "plain"), **_document(view))
    differences = [
        float((saved.tensors[name] - tensor).abs().max())
        for name, tensor in State.load(plain).tensors.items()
        if name in ("0.recurrent_state", "3.recurrent_state")
    ]
    assert differences[0] < 1e-4 < differences[1]  # the first layer's writes stay

    view.undo()
    assert (view.erasures, view.grid.cells, view.fields["erased"].value) == ([erasure], None, listed(first))
    view.undo()
    assert "loss_change" not in view.token_map.metrics
    assert len(view.result.result["columns"]) == 1
    with refused("the number of erasures", 0):
        view.undo()
    view.restore()
    assert view.fields["erased"].value == ""


def test_as_many_random_writes_are_a_control(view: MemoryView, worker: Worker) -> None:
    view.choose(None)
    view.explain().result(SECONDS)
    with naming(ValueError, "nothing is erased yet"):
        view.erase_random().result(SECONDS)
    view.mark_strongest()
    view.erase().result(SECONDS)
    (erasure,) = view.erasures
    drawn = []
    for _ in range(2):
        view.erase_random().result(SECONDS)
        assert view.control is not None and view.target is not None
        drawn.append(view.control.erased)
        assert len(drawn[-1]) == 3 and not {*drawn[-1]} & {*erasure.erased} and max(drawn[-1]) <= view.target.position
        expected = worker.call("erase", erased=drawn[-1], target=view.target, **_document(view))
        assert view.control.after.value == pytest.approx(expected.after.value, abs=1e-6)
        rest = expected.losses_after[min(erasure.erased) + 1 :].mean()  # of the same tokens as in the other columns
        column = view.result.result["columns"][2]
        told = f" Without 3 random tokens ({listed(drawn[-1])}), the contrast is "
        assert column["title"] == "Without 3 random tokens" and told in view.result.result["change"]
        label = f"mean next-token loss after token {min(erasure.erased)} (the first erased one)"
        assert [label, f"{rest:.4f} nats"] in column["facts"]
    assert drawn[0] != drawn[1] and view.erasures == [erasure] and view.buttons["random"].icon == ""
    view.undo()
    assert view.control is None
    view.restore()


def _document(view: MemoryView) -> dict[str, Any]:
    return {"model": "tiny-deltanet", "token_ids": view.exploration._known.token_ids}


def test_layers_and_counterfactual(view: MemoryView, tmp_path: Path) -> None:
    layers = view.layers
    layers.lens().result(SECONDS)
    assert layers.layer_lens is not None and view.target is not None
    assert layers.layer_lens.token == view.target.token_ids[0]
    assert [row[0] for row in layers.table.tables[0]["rows"]] == ["embedding", *(f"layer {n}" for n in range(4))]
    layers.counterfactual("hand is width", "hand is block", " block").result(SECONDS)
    found = layers.changed
    assert found is not None
    assert found.total > 1  # the changed document's memory moves the answer towards its word
    np.testing.assert_array_equal(layers.grid.values, found.effects)
    note = layers.grid.grid["note"]
    assert note.startswith(
        "The changed document has “hand is block” instead of “hand is width”: log p of “·block” minus"
    )
    assert "with the whole memory of the changed document it moves by +" in note
    with refused("the stretch to replace", "nothing of this"):
        layers.counterfactual("nothing of this", "x").result(SECONDS)
    page = view.save_html(tmp_path / "memory.html").read_text(encoding="utf-8")
    assert page.count("memory-grid") > 2 and "Without the erased writes" not in repr(view)


def test_it_explains_the_selected_rollout_of_an_explorer(worker: Worker) -> None:
    explorer = RewardExplorer(text=TEXT, worker=worker, settings={"group_size": 2, "num_chunks": 2})
    explorer.shown.result(SECONDS)
    view = explorer.memory_view()
    view.shown.result(SECONDS)
    explorer.inspector.selected = 1
    view.shown.result(SECONDS)
    rollout = explorer.inspector.rollouts.iloc[1]
    assert view.target == Target(position=int(rollout["position"]), token_ids=tuple(rollout["rollout_ids"]))
    assert view.prediction is not None
    assert view.prediction.value == pytest.approx(float(np.sum(rollout["logprobs"])), abs=1e-3)
    target, newer = view.target, explorer.memory_view()
    newer.shown.result(SECONDS)
    explorer.inspector.selected = 0
    newer.shown.result(SECONDS)
    assert newer.target is not None and newer.target.token_ids == tuple(explorer.inspector.rollouts["rollout_ids"][0])
    assert view.target == target and "no longer follows" in view.notice.status
    assert len(_observers(explorer.inspector, "selected")) == 1
    newer.close()
    assert not _observers(explorer.inspector, "selected") and not _observers(explorer.token_map, "document")


def _observers(widget: Any, trait: str) -> list[Any]:
    """The functions of memory views that a change of the trait calls."""
    calls = widget._trait_notifiers.get(trait, {}).get("change", [])
    return [call for call in calls if getattr(call, "__module__", "") == "widgets.memory_links"]


def test_after_adapting_the_change_of_each_effect_is_shown(worker: Worker) -> None:
    panel = TTTPanel(text=TEXT, question="", held_out=0, worker=worker)
    panel.shown.result(SECONDS)
    view = panel.memory_view()
    wait_for(lambda: view.attribution is not None)  # `shown` may be a request that the panel's next change has replaced
    view.shown.result(SECONDS)
    target, before = view.target, view.attribution
    assert before is not None
    ids = panel._ids
    config = replace(panel.config, steps=1, lr=1e-3)
    worker.call("adapt", lambda _: None, model="tiny-deltanet", token_ids=ids, config=config)
    try:
        panel._show_weights_everywhere()
        wait_for(lambda: view.attribution is not before)
        wait_for(lambda: "effect_change" in view.token_map.metrics)
        assert view.target == target and view.attribution is not None
        change = view.attribution.by_token() - before.by_token()
        np.testing.assert_allclose(metric(view, "effect_change"), change, atol=1e-5)
        assert np.abs(change).max() > 1e-4
        once = view.attribution  # adapting anew by as many steps leaves the panel's words about its weights as they are
        config = replace(config, lr=2e-3)
        worker.call("adapt", lambda _: None, model="tiny-deltanet", token_ids=ids, config=config, weights="original")
        panel._show_weights_everywhere()
        wait_for(lambda: view.attribution is not once)
    finally:
        panel.reset().result(SECONDS)


def test_what_cannot_be_is_said(view: MemoryView) -> None:
    with refused("the token to explain", 1):
        view.explain(1).result(SECONDS)
    assert "the token to explain" in view.error
    assert view.attribution is not None  # what is shown stays
    view.fields["erased"].value = "5-"
    assert "such as 646-648, 805" in view.error
    view.fields["erased"].value = ""


def test_lists_of_tokens() -> None:
    assert tokens_in(" 7, 3-5 ,4", 9) == (3, 4, 5, 7)
    assert listed((7, 3, 4, 5)) == "3-5, 7"
    for wrong in ("a", "1 2", "5-"):
        with refused("the tokens to erase", wrong):
            tokens_in(wrong, 9)
    for wrong in ("5-3", "9"):
        with refused("a range of tokens", wrong, "from 0 to 8, the smaller number first"):
            tokens_in(wrong, 9)


def test_the_grid_refuses_a_head_that_there_is_not(view: MemoryView) -> None:
    grid = MemoryGrid()
    grid.show(view.grid.parts, view.grid.values, "title")
    with refused("a chosen cell", [4, 0]):
        grid.chosen = [[4, 0]]
    with refused("a head", (9, "recurrent_state", 0)):
        grid.choose([(9, "recurrent_state", 0)])


def test_rollouts_with_and_without_the_erased_writes(view: MemoryView, worker: Worker, tmp_path: Path) -> None:
    view.choose(None)
    view.explain().result(SECONDS)
    with naming(ValueError, "nothing is erased yet"):
        view.rollouts.roll_out().result(SECONDS)
    view.mark(range(30))  # the whole fact
    view.erase().result(SECONDS)
    view.rollouts.fields["k"].value = 8
    view.rollouts.roll_out().result(SECONDS)
    (erasure,), target, prediction = view.erasures, view.target, view.prediction
    assert target is not None and prediction is not None
    ids = np.append(view.exploration._known.token_ids, np.array(prediction.answer_ids, dtype=np.int32))
    asked = {"model": "tiny-deltanet", "token_ids": ids, "positions": [target.position], "n": 4, "k": 8, "seed": 0}
    intact = worker.call("rollouts", **asked)[0]
    edited = worker.call("rollouts", **asked, erased=erasure.erased)[0]
    pairs = view.rollouts.pairs
    assert [list(row) for row in pairs["rollout_ids_a"]] == intact.rollout_ids.tolist()
    assert [list(row) for row in pairs["rollout_ids_b"]] == edited.rollout_ids.tolist()
    assert pairs["changed"].map(any).any()
    assert "(all writes)" in repr(view) and "reference: the greedy answer with all writes" in repr(view)
    data = view.save_html(tmp_path / "memory.html").read_text(encoding="utf-8")
    head = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', data, re.DOTALL)[0])[
        "head"
    ]
    assert head["conclusion"] == view.result.result["change"]
    facts = {"model": "tiny-deltanet", "answer": " width", "tokens to erase": listed(erasure.erased)}
    assert facts.items() <= dict(head["facts"]).items()

    view.rollouts.fields["k"].value = 9
    with refused("tokens (k)", 9, "at most 8, as many as the reference has"):
        view.rollouts.roll_out().result(SECONDS)
    view.rollouts.fields["k"].value = 5
    view.restore()
    assert view.rollouts.pairs.empty and view.rollouts.layout.display == "none"
    assert view.result.conclusion.startswith("log p of “·width” minus log p of “·block” after token ")


def test_the_model_is_switched(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    ids, before = view.exploration._known.token_ids, view.target
    assert view.token_map.metrics and view.buttons["strongest"].description.endswith("and its neighbours")
    view.mark([5])
    view.fields["model"].value = "tiny-lact"  # as chosen or typed in the page
    assert not view.shown.done() and view.notice.stale  # what is shown is dimmed while another model reads
    assert view.result.result["model"] == "tiny-deltanet (shipped model)" and view.exploration.model == "tiny-deltanet"
    view.shown.result(SECONDS)
    assert view.fields["erased"].value == "" and view.token_map.highlight == [] and not view.notice.stale
    assert (view.exploration.model, view.layers.exploration.model) == ("tiny-lact", "tiny-lact")
    assert view.target is not None and before is not None
    assert view.target.position == len(view.exploration._known.token_ids) - 1
    policy, _ = load_model("tiny-lact", device="cpu")
    core = write_attribution(policy, torch.from_numpy(view.exploration._known.token_ids).long(), view.target)
    np.testing.assert_allclose(metric(view, "effect"), core.by_token(), atol=1e-4)
    assert {part.name for part in view.grid.parts} == {"fast_weights", "window"}
    with naming(FileNotFoundError, "no-such-model"):
        view.switch("no-such-model").result(SECONDS)
    field = view.fields["model"]
    told = "This model is not read: the view below still shows tiny-lact (shipped model)."
    assert "no-such-model" in view.error and (field.value, field.error) == ("no-such-model", told)
    assert view.attribution is not None and view.result.result["model"] == "tiny-lact (shipped model)"  # it stays
    with naming(FileNotFoundError, "no-such-model"):  # nothing but what is typed is read
        view.read().result(SECONDS)
    assert field.value == "no-such-model"
    field._on_message(field, {"typed": "tiny-lact"}, [])  # as the page sends it
    assert (field.error, view.error, view.exploration.model) == ("", "", "tiny-lact")
    view.switch("tiny-deltanet").result(SECONDS)
    assert view.target == before and np.array_equal(view.exploration._known.token_ids, ids)


def test_an_answer_that_was_filled_in_belongs_to_the_first_document_and_a_typed_one_stays(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    field, tokenizer = view.fields["answer"], view.exploration.tokenizer
    view.read(TEXT).result(SECONDS)
    assert field.value == " width" and view.result.result["own"] == ""
    other = TEXT.replace("hand? The secret word for hand is", "user? The key of the door is")
    view.read(other).result(SECONDS)
    assert field.value == "" and view.target is not None and view.prediction is not None
    assert view.target.token_ids == (int(view.prediction.alternatives[0]),) and view.result.result["own"] == ""

    field._on_message(field, {"typed": " width"}, [])  # as the page sends it
    view.read(other + " old. The key of the door is").result(SECONDS)
    assert field.value == " width" and view.target.token_ids == tuple(tokenizer(" width")["input_ids"][-1:])
    found = view.prediction
    own, shares = str(tokenizer.decode(found.alternatives[:1])), (found.probabilities[0], np.exp(found.value))
    first, second = (f"{100 * share:.3g}\u00a0%" for share in shares)
    said = f"The model itself says “{own.replace(' ', '·')}” here ({first}), not “·width” ({second})."
    assert view.result.result["own"] == said and said in repr(view)


class Unattributable(Worker):
    """A worker whose model is of a family whose writes cannot be scaled, as those that need CUDA."""

    def submit(self, method: str, on_step: Any = None, **arguments: Any) -> Future[Any]:
        if method != "attribute":
            return super().submit(method, on_step, **arguments)
        policy, _ = load_model("tiny-deltanet", device="cpu")
        failed: Future[Any] = Future()
        try:
            FastWeightLM.memory_parts.fget(policy)  # type: ignore[attr-defined]
        except ValueError as error:
            failed.set_exception(error)
        return failed


def test_a_family_without_attribution_says_so_and_shows_the_prediction() -> None:
    worker = Unattributable("cpu")
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    with refused("the model's family"):
        view.shown.result(SECONDS)
    assert "whose writes can be scaled token by token" in view.error
    assert view.prediction is not None and view.attribution is None
    assert view.result.result["columns"][0]["title"] == "With all writes"
    assert view.result.result["strongest"] == [] and [*view.token_map.metrics] == ["loss", "entropy"]
    worker.close()


def test_another_document_and_other_weights_leave_nothing_of_the_first(worker: Worker) -> None:
    view = MemoryView(text=TEXT, answer=" width", worker=worker)
    view.shown.result(SECONDS)
    view.layers.lens().result(SECONDS)
    first = view.layers.table.tables
    assert first and view.grid.cells is None
    view.read(TEXT.replace("red", "old")).result(SECONDS)
    assert view.layers.table.tables == []  # the same position and answer, in another document
    view.layers.lens().result(SECONDS)
    assert view.layers.table.tables and view.layers.table.tables != first
    prompt = view.exploration._known.token_ids
    config = TTTConfig(steps=1, lr=1e-3, refine=None)
    worker.call("adapt", on_step=lambda _: None, model=view.exploration.model, token_ids=prompt, config=config)
    try:
        for act in (view.explain, view.layers.lens, lambda: view.save_state("unwritten.safetensors")):
            with naming(ValueError, "the weights have changed"):
                act().result(SECONDS)
    finally:
        worker.call("reset", model=view.exploration.model)
    assert not Path("unwritten.safetensors").exists()
