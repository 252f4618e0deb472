"""The TTT panel without a page: methods side by side, answers with their reference, a second adaptation, saved weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from refine_lab.config import RefineConfig
from refine_lab.data.sample import sample_document
from refine_lab.explore.client import Worker
from refine_lab.models import load_model
from refine_lab.statistics.rest_change import rest_change
from refine_lab.training.adaptation import Reading, Update, adapted, read_prompt
from refine_lab.ttt_config import TTTConfig
from tests.support.refusals import naming, refused
from tests.support.small_document import SECONDS, TEXT, wait_for, worker  # noqa: F401
from widgets.ttt_panel import TTTPanel

pytestmark = pytest.mark.process

CONFIG = TTTConfig(refine=RefineConfig(reward="binary", margin=16), steps=2, lr=1e-3)


def panel_of(worker: Worker, **settings) -> TTTPanel:
    given = {"text": TEXT, "question": "print(area", "reference": "(width", "config": CONFIG} | settings
    return TTTPanel(worker=worker, **given)


def test_methods_are_compared_from_the_same_weights(worker: Worker, tmp_path: Path) -> None:
    """Each has the losses of an adaptation of its own, whatever the weights were before the click."""
    panel = panel_of(worker)
    panel.start().result(SECONDS)
    panel.compare().result(SECONDS)
    assert [*panel.results] == ["SFT", "REFINE"]
    policy, _ = load_model("tiny-deltanet", device="cpu")
    prompt, ids = panel.prompt, torch.from_numpy(panel.prompt.ids).long()
    rests = {}

    def keep(readings: list[Reading], _: Update) -> None:
        readings.append(read_prompt(policy, ids))

    for label, each in panel.results.items():
        readings = [read_prompt(policy, ids)]
        with adapted(policy, ids[: prompt.adapted], each.config, partial(keep, readings)):
            pass
        rests[label] = [prompt.held.rest(reading.losses) for reading in readings]
        means = [float(values.mean()) for values in rests[label]]
        assert [row["rest_loss"] for row in each.steps] == pytest.approx(means, abs=1e-4)
    assert panel.results["SFT"].steps[0] == panel.results["REFINE"].steps[0]
    (difference,) = [result for result in panel.result.results if result["pair"]]
    expected = rest_change(*(rests[label][-1].double().numpy() for label in ("SFT", "REFINE")))
    assert difference["interval"][1] == pytest.approx(expected.change.value, abs=1e-4)
    assert [line["method"] for line in panel.curves.curves["panels"][0]["lines"]] == ["SFT", "REFINE"]
    change = panel.token_map.metrics["loss_refine_minus_sft"].values[prompt.held.first : prompt.held.stop]
    assert np.mean(change) == pytest.approx(expected.change.value, abs=1e-4)
    assert panel.notice.status.startswith("After 2 steps each: loss ")
    wait_for(lambda: panel.fields["weights"].value.startswith("Adapted with REFINE (2 updates)."))
    assert "No copy" not in panel.fields["weights"].value
    assert [value for _, value in panel.fields["saved"].options] == ["", "SFT", "REFINE"]
    panel.fields["saved"].value = "SFT"
    other = panel.save_weights(tmp_path / "refine", "REFINE")
    paths = {"SFT": panel.save_weights(tmp_path / "sft").result(SECONDS), "REFINE": other.result(SECONDS)}
    assert f"The weights of SFT are saved to {paths['SFT']}" in panel.notice.status
    for label, path in paths.items():
        saved, _ = load_model(path, device="cpu")
        losses = prompt.held.rest(read_prompt(saved, ids).losses)
        assert torch.equal(losses, rests[label][-1]), label
    assert panel.reset().result(SECONDS) == 2
    assert worker.call("as_loaded", model="tiny-deltanet")
    wait_for(lambda: panel.fields["saved"].layout.display == "none")
    assert panel.fields["saved"].label == "current weights" and panel.buttons["save"].disabled


def test_which_methods_can_be_compared(worker: Worker) -> None:
    panel = panel_of(
        worker, config=TTTConfig(refine=RefineConfig(estimator="dft", nsp_coef=1.0, ntp_coef=0.0), steps=1)
    )
    assert [*panel.compared] == ["SFT", "REFINE", "DFT"]
    panel.compared["SFT"].value = False
    panel.compare().result(SECONDS)
    assert [(label, each.method) for label, each in panel.results.items()] == [("REFINE", "refine"), ("DFT", "dft")]
    panel.compared["DFT"].value = False
    for methods in (None, ["SFT"], ["SFT", "SFT"], ["SFT", "DPO"]):
        with refused("the methods to compare", allowed="two or more of SFT, REFINE, DFT"):
            panel.compare(methods)
    panel.reset().result(SECONDS)


def test_fields_that_are_edited_during_a_comparison_change_no_method(worker: Worker) -> None:
    panel = panel_of(worker)
    panel.fields["steps"].value = 40
    chain = panel.compare()
    wait_for(lambda: len(panel.steps) >= 2)
    assert [*panel.results] == ["SFT"]
    panel.fields["steps"].value, panel.fields["lr"].value, panel.fields["reward"].value = 1, 0.5, "cosine"
    chain.result(SECONDS)
    configs = [each.config for each in panel.results.values()]
    assert [(config.steps, config.lr) for config in configs] == [(40, 1e-3)] * 2
    assert configs[1].refine.reward == "binary" and len(panel.results["REFINE"].steps) == 41
    panel.reset().result(SECONDS)


def test_a_stopped_comparison_ends_with_the_method_that_runs(worker: Worker) -> None:
    panel = panel_of(worker)
    panel.fields["steps"].value = 10_000
    chain = panel.compare()
    wait_for(lambda: len(panel.steps) >= 3)
    panel.stop()
    chain.result(SECONDS)
    assert [*panel.results] == ["SFT"] and "(stopped): loss" in panel.notice.status
    panel.reset().result(SECONDS)


def test_answers_are_right_or_wrong_and_the_reference_has_a_probability(worker: Worker) -> None:
    panel = TTTPanel(worker=worker, config=TTTConfig(refine=None, steps=4, lr=1e-4))
    assert panel.fields["reference"].value == sample_document().answer.strip() == "width"
    panel.start().result(SECONDS)
    before, after, reference = panel._beside.rows
    assert (before["label"], before["answer"], before["verdict"]) == (
        "before adaptation",
        "width.",
        "right (exact match)",
    )
    assert (after["label"], after["answer"], after["verdict"]) == ("after SFT", panel.answers["SFT"], "wrong")
    assert reference == {"label": "reference", "answer": "width"}
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    ids, (token,) = panel.prompt.ids.tolist(), panel.prompt.reference_ids
    assert tokenizer.decode([token]) == " width"
    with torch.no_grad():
        expected = float(policy(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
    assert panel.before.reference_logprob == pytest.approx(expected, abs=1e-4)
    assert before["logprob"] == f"{expected:.3f}".replace("-", "−")
    assert after["logprob"].startswith(f"{panel.results['SFT'].after.reference_logprob:.3f}".replace("-", "−"))
    panel.fields["reference"].value = "stone | wid"
    panel.start("original").result(SECONDS)
    assert panel._beside.rows[0]["verdict"] == "right (contains the reference)"
    panel.fields["reference"].value = ""
    panel.start("original").result(SECONDS)
    assert [{*row} - {"label", "answer"} for row in panel._beside.rows] == [{"verdict"}] * 2
    assert panel._beside.rows[0]["verdict"] == ""
    panel.reset().result(SECONDS)


def test_the_reference_belongs_to_its_question(worker: Worker) -> None:
    panel = TTTPanel(worker=worker)
    question, reference = panel.fields["question"], panel.fields["reference"]
    first, question.value = question.value, "What is the secret word for line?"
    assert reference.value == ""
    question.value = first
    assert reference.value == "width"
    reference.value, question.value = "graph", "What is the secret word for line?"
    assert reference.value == "graph"


def test_a_second_adaptation_asks(worker: Worker) -> None:
    panel = panel_of(worker)
    panel.ask().result(SECONDS)
    first, before = panel.steps, panel.before
    assert [row["step"] for row in first] == [0, 1, 2]
    panel.ask().result(SECONDS)
    assert panel.question.layout.display == "flex" and panel.steps is first
    assert panel.notice.status.startswith("The weights are already adapted with REFINE (2 updates).")
    with naming(ValueError, "the weights are already adapted with REFINE (2 updates)"):
        panel.start().result(SECONDS)
    assert panel.question.layout.display == "none" and panel.steps is first
    assert worker.call("open", model="tiny-deltanet")["updates"] == 2
    panel.fields["method"].value = "SFT"
    panel.continue_adapted().result(SECONDS)
    assert [*panel.results] == ["REFINE, then SFT"]
    assert panel.steps[:3] == first and [row["step"] for row in panel.steps] == [0, 1, 2, 3, 4]
    assert (panel.before.reading.losses[1:] == before.reading.losses[1:]).all() and panel.before.answer == before.answer
    assert panel.rest.before == pytest.approx(first[0]["rest_loss"], abs=1e-6)
    panel.fields["method"].value = "REFINE"
    panel.start_over().result(SECONDS)
    assert panel.steps == first
    panel.ask().result(SECONDS)
    panel.cancel()
    assert (panel.question.layout.display, panel.notice.status) == ("none", "")
    panel.reset().result(SECONDS)


def test_adapted_weights_are_taken_along(worker: Worker, tmp_path: Path) -> None:
    panel = panel_of(worker)
    with naming(ValueError, "adapt the model before you save it"):
        panel.save_weights(tmp_path / "mine").result(SECONDS)
    panel.start().result(SECONDS)
    wait_for(lambda: not panel.buttons["save"].disabled)
    panel.fields["folder"].value = str(tmp_path / "mine")
    path = panel.save_weights().result(SECONDS)
    assert path == tmp_path / "mine" and f"Saved to {path}" in panel.notice.status
    with naming(ValueError, "the folder", path):
        panel.save_weights(path).result(SECONDS)
    assert "one that does not exist yet" in panel.error
    ids, answer = panel.prompt.ids, panel.answers["REFINE"]
    fingerprint = worker.call("fingerprint", model="tiny-deltanet")
    assert worker.call("fingerprint", model=str(path)) == fingerprint
    assert worker.call("answer", model=str(path), token_ids=ids, rule=panel.prompt.rule) == answer
    panel.reset().result(SECONDS)
    wait_for(lambda: panel.buttons["save"].disabled)
