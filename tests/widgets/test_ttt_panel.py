"""The TTT panel without a page: adaptation, the held-out remainder, stop and reset, and its answers, through a real worker."""

from __future__ import annotations

import base64
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from refine_lab.config import BUILT_IN_REWARDS, RefineConfig
from refine_lab.data.sample import sample_document
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.prompts import Example, encode
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.explore.client import Worker
from refine_lab.models import load_model
from refine_lab.training.adaptation import adapted, read_prompt
from refine_lab.training.held_out_rest import HeldOutRest
from refine_lab.ttt_config import TTTConfig
from tests.support.refusals import refused
from tests.support.small_document import SECONDS, TEXT, wait_for, worker  # noqa: F401
from widgets.core.packing import unpack
from widgets.figures.tables import Table
from widgets.ttt_panel import TTTPanel

pytestmark = pytest.mark.process


@pytest.mark.parametrize("method", ["REFINE", "SFT"])
def test_ttt_start_and_reset(worker: Worker, method: str) -> None:
    before = worker.call("fingerprint", model="tiny-deltanet")
    panel = TTTPanel(text=TEXT, question="area", worker=worker, held_out=0)
    panel.shown.result(SECONDS)
    assert [*panel.token_map.metrics] == ["entropy", "loss"]
    assert "mean entropy" in panel.notice.status
    panel.fields["method"].value = method
    panel.fields["steps"].value, panel.fields["lr"].value = 3, 1e-3
    panel.start().result(SECONDS)
    assert [row["step"] for row in panel.steps] == [0, 1, 2, 3]
    assert panel.steps[-1]["loss"] < panel.steps[0]["loss"]
    assert ("reward" in panel.steps[1]) == (method == "REFINE")
    assert panel.answers.keys() == {"before", method}
    change = panel.token_map.metrics["entropy_change"].values
    expected = panel.steps[-1]["entropy"] - panel.steps[0]["entropy"]
    assert np.nanmean(change) == pytest.approx(expected, abs=1e-4)
    assert [each["name"] for each in panel.curves.curves["panels"]][:2] == ["loss", "entropy"]
    assert worker.call("fingerprint", model="tiny-deltanet") != before
    adapted = f"Adapted with {method} (3 updates). Reset restores the original weights."
    wait_for(lambda: panel.fields["weights"].value == adapted)
    other = TTTPanel(text=TEXT, worker=worker)  # which did not move them, and says so
    wait_for(lambda: f"Adapted with {method} (3 updates)" in other.fields["weights"].value)
    assert panel.reset().result(SECONDS) == 3
    assert worker.call("fingerprint", model="tiny-deltanet") == before
    wait_for(lambda: panel.fields["weights"].value == "Original weights.")


def test_ttt_refuses_what_would_lose_the_weights(worker: Worker) -> None:
    before = worker.call("fingerprint", model="tiny-deltanet")
    panel, other = TTTPanel(text=TEXT, worker=worker), TTTPanel(text=TEXT, worker=worker)
    panel.shown.result(SECONDS)
    said = panel.notice.status
    panel.stop()  # nothing runs: nothing happens
    assert panel.notice.status == said
    panel.fields["steps"].value = 10_000
    chain = panel.start()
    wait_for(lambda: len(panel.steps) >= 2)
    for again in (panel.ask, panel.start, panel.compare, panel.reset, panel.save_weights):
        with pytest.raises(ValueError, match="this panel is already adapting"):
            again()
    with pytest.raises(ValueError, match="the model is being adapted: stop the adaptation first"):
        other.reset().result(SECONDS)
    panel._pressed("ask")  # a second click
    assert "this panel is already adapting" in panel.error
    assert "error: this panel is already adapting" in repr(panel)
    panel.stop()
    chain.result(SECONDS)
    wait_for(lambda: panel.error == "")
    panel.reset().result(SECONDS)
    assert worker.call("fingerprint", model="tiny-deltanet") == before
    assert worker.call("as_loaded", model="tiny-deltanet") is True


@pytest.mark.parametrize("method", ["REFINE", "SFT"])
def test_the_rest_of_the_document_is_scored_and_not_adapted_to(worker: Worker, method: str) -> None:
    """Every number is that of the model adapted to the first part alone, whatever follows the document."""
    config = TTTConfig(refine=RefineConfig(reward="binary", margin=16), steps=2, lr=1e-3)  # TEXT is short
    panel = TTTPanel(text=TEXT, question="print(area", worker=worker, config=config)
    panel.fields["method"].value = method
    panel.start().result(SECONDS)
    panel.reset().result(SECONDS)
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    first = len(ids) - round(0.33 * len(ids))
    assert panel.prompt.held == HeldOutRest(first=first, stop=len(ids)) and len(panel.prompt.ids) > len(ids)
    levels = [read_prompt(policy, ids).losses]
    with adapted(policy, ids[:first], panel.config, lambda _: levels.append(read_prompt(policy, ids).losses)):
        pass
    rests = [float(losses[first - 1 :].mean()) for losses in levels]
    assert [row["rest_loss"] for row in panel.steps] == pytest.approx(rests, abs=1e-4)
    assert [row["loss"] for row in panel.steps] == pytest.approx(
        [float(x[: first - 1].mean()) for x in levels], abs=1e-4
    )
    assert panel.rest.change.value == pytest.approx(rests[-1] - rests[0], abs=1e-4)
    (result,) = panel.result.results
    assert panel.rest.sentence in repr(panel) and result["verdict"] == panel.rest.verdict
    assert result["interval"] == [panel.rest.interval[0], panel.rest.change.value, panel.rest.interval[1]]
    assert panel.token_map.metric == "rest_change"
    coloured = np.flatnonzero(np.isfinite(panel.token_map.metrics["rest_change"].values))
    assert coloured.tolist() == [*range(first, len(ids))]
    (rest,) = panel.curves.curves["panels"][0]["lines"]
    assert panel.curves.curves["panels"][0]["name"] == "rest_loss" and (rest["method"], rest["front"]) == (method, True)


def test_a_rate_that_harms_the_rest_is_no_gain(worker: Worker) -> None:
    """The loss on the adapted part falls while that on the remainder, another text, rises."""
    text = "The red fox sleeps in the den. " * 30 + sample_document().document[:900]
    panel = TTTPanel(text=text, worker=worker, config=TTTConfig(refine=None, steps=4, lr=3e-3), held_out=0.4)
    panel.start().result(SECONDS)
    assert (
        panel.steps[-1]["loss"] < panel.steps[0]["loss"] and panel.steps[-1]["rest_loss"] > panel.steps[0]["rest_loss"]
    )
    assert panel.result.results[0]["verdict"] == "no gain beyond noise, and the loss rises"
    panel.fields["held_out"].value = 0
    panel.start("original").result(SECONDS)
    assert panel.rest is None and panel.result.results == [] and "rest_loss" not in panel.steps[0]
    panel.reset().result(SECONDS)


def test_ttt_after_a_step_that_failed(worker: Worker) -> None:
    """A decay of the weights by a factor of -9 a step makes the gradient NaN after a few steps."""
    panel = TTTPanel(text=TEXT, config=TTTConfig(steps=60, lr=10, weight_decay=1), worker=worker)
    with pytest.raises(FloatingPointError):
        panel.start().result(SECONDS)
    assert panel.error.startswith("training diverged") and "try an lr below 10" in panel.error
    wait_for(lambda: "Adapted" in panel.fields["weights"].value)
    panel.reset().result(SECONDS)
    assert "Original weights restored exactly" in panel.notice.status


def test_ttt_stops_within_a_step_and_keeps_what_it_has(worker: Worker) -> None:
    before = worker.call("fingerprint", model="tiny-deltanet")
    panel = TTTPanel(text=TEXT, worker=worker)
    panel.fields["steps"].value = 10_000
    chain = panel.start()
    deadline = time.monotonic() + SECONDS
    while len(panel.steps) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    seen = len(panel.steps)
    panel.stop()
    chain.result(SECONDS)
    assert len(panel.steps) <= seen + 1
    assert worker.call("open", model="tiny-deltanet")["updates"] == len(panel.steps) - 1
    assert "(stopped)" in panel.notice.status
    assert not panel.buttons["start"].disabled
    panel.reset().result(SECONDS)
    assert worker.call("fingerprint", model="tiny-deltanet") == before


def test_ttt_begins_with_what_it_is_given(worker: Worker) -> None:
    refine = RefineConfig(reward="cosine", num_chunks=3, nsp_coef=0.7)
    panel = TTTPanel(text=TEXT, worker=worker, config=TTTConfig(refine=refine, steps=2, lr=3e-4, weight_decay=0.2))
    assert panel.config == TTTConfig(refine=refine, steps=2, lr=3e-4, weight_decay=0.2)
    assert panel.fields["reward"].options == BUILT_IN_REWARDS
    panel.fields["reward"].value, panel.fields["steps"].value = "hybrid", 5
    assert panel.config.refine == replace(refine, reward="hybrid")
    assert (panel.config.steps, panel.config.weight_decay) == (5, 0.2)
    for name, label in (("steps", "steps"), ("answer_tokens", "max answer tokens")):
        kept = panel.fields[name].value
        panel.fields[name]._on_message(None, {"typed": "0"}, [])  # as the page sends it
        assert panel.error == f"{label} must be a whole number from 1 to 1,000,000, got 0"
        assert panel.fields[name].value == kept  # refused, not changed to 1
        panel.fields[name]._on_message(None, {"typed": "7"}, [])
        assert (panel.fields[name].value, panel.error) == (7, "")
    panel.fields["method"].value = "SFT"
    assert panel.config.refine is None
    sft = TTTPanel(text=TEXT, worker=worker, config=TTTConfig(refine=None, steps=2, lr=3e-4))
    assert sft.fields["method"].value == "SFT"
    assert sft.fields["reward"].disabled


def test_the_very_tokens_of_an_example_until_it_is_edited(worker: Worker) -> None:
    tokenizer = TTTPanel(text=TEXT, worker=worker).exploration.tokenizer
    ids = [token for line in TEXT.splitlines(True) for letter in line for token in tokenizer(letter)["input_ids"]]
    example = Example(
        name="one", prompt_ids=tuple(ids[:200]), question_start=150, answer_ids=(), answers=(), question="?", documents=()
    )  # fmt: skip
    assert len(tokenizer(TEXT[:200])["input_ids"]) < 200  # which tokenises otherwise
    config = TTTConfig(refine=None, steps=1, lr=1e-4)
    panel = TTTPanel(prompt=example, config=config, adapt_on="document", held_out=0, worker=worker)
    assert "200 tokens" in (panel.shown.result(SECONDS) or panel.notice.status)
    panel.start().result(SECONDS)
    assert (panel.prompt.ids.tolist(), panel.prompt.adapted) == (ids[:200], 150)
    assert len(panel.token_map.text) == 200
    panel.reset().result(SECONDS)
    panel.fields["held_out"].value = 40
    panel.start().result(SECONDS)
    assert panel.prompt.ids.tolist() == ids[:200] and panel.prompt.held == HeldOutRest(first=90, stop=150)
    panel.reset().result(SECONDS)
    panel.fields["question"].value, panel.fields["held_out"].value = " other", 0
    panel.start().result(SECONDS)
    assert panel.prompt.adapted < len(panel.prompt.ids) < 200
    panel.reset().result(SECONDS)


def test_a_prompt_is_answered_by_its_rule_and_an_edited_one_by_its_first_line(worker: Worker) -> None:
    """The model goes on from `if x:` with a newline."""
    tokenizer = TTTPanel(text=TEXT, worker=worker).exploration.tokenizer
    prompt = encode(parse("one", "if x:", ()), tokenizer)
    settings = {"config": TTTConfig(refine=None, steps=1, lr=1e-6), "held_out": 0, "worker": worker}
    panel = TTTPanel(prompt=prompt, rule=AnswerRule(max_tokens=24, strip_leading=False), **settings)
    own = TTTPanel(text="if x:", **settings)
    assert (panel.fields["answer_tokens"].value, own.fields["answer_tokens"].value) == (24, 32)
    for each in (panel, own):
        each.start().result(SECONDS)
        each.reset().result(SECONDS)
    assert panel.answers == {"before": "", "SFT": ""}
    assert own.answers["before"] and "\n" not in own.answers["before"]
    panel.fields["document"].value = "if y:"
    panel.start().result(SECONDS)
    panel.reset().result(SECONDS)
    assert panel.answers["before"]


def test_another_panel_stops_what_nobody_else_can(worker: Worker) -> None:
    lost = TTTPanel(text=TEXT, worker=worker)
    lost.fields["steps"].value = 10_000
    chain = lost.start()
    wait_for(lambda: len(lost.steps) >= 2)
    panel = TTTPanel(text=TEXT, worker=worker)
    wait_for(lambda: not panel.buttons["stop"].disabled)
    panel.stop()
    chain.result(SECONDS)
    assert panel.reset().result(SECONDS) >= 1
    lost.fields["steps"].value = 10_000
    chain = lost.start()
    wait_for(lambda: len(lost.steps) >= 2)
    lost.close()
    chain.result(SECONDS)
    panel.reset().result(SECONDS)


def test_every_panel_says_how_far_the_weights_have_moved(worker: Worker) -> None:
    given = {"text": TEXT, "question": "area", "worker": worker}
    one, other = (TTTPanel(config=TTTConfig(refine=None, steps=2, lr=1e-4), **given) for _ in range(2))
    for panel in (one, other):
        panel.shown.result(SECONDS)
    one.start().result(SECONDS)
    moved = "Adapted with SFT (2 updates). Reset restores the original weights."
    wait_for(lambda: [panel.fields["weights"].value for panel in (one, other)] == [moved] * 2)
    assert other.reset().result(SECONDS) == 2
    wait_for(lambda: [panel.fields["weights"].value for panel in (one, other)] == ["Original weights."] * 2)


def test_a_page_of_ttt_holds_the_answers(worker: Worker, tmp_path: Path) -> None:
    panel = TTTPanel(text=TEXT, question="area", worker=worker, config=TTTConfig(refine=None, steps=1, lr=1e-4))
    panel.start().result(SECONDS)
    panel.reset().result(SECONDS)
    all_prompts = Table(pd.DataFrame({"method": ["SFT"], "loss after": ["2.5"]}), "All prompts")
    page = panel.save_html(tmp_path / "page.html", more=[all_prompts], conclusion="SFT is best.").read_text("utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    states = [part["state"] for part in json.loads(data)["widgets"]]
    assert states[-1]["tables"][0]["rows"] == [["SFT", "2.5"]]
    assert json.loads(data)["head"]["conclusion"].startswith("SFT is best. ")
    (result,) = states[0]["results"]
    assert f"{result['verdict']}: {result['details']}".casefold() == panel.rest.sentence.casefold()
    assert [row["answer"] for row in states[2]["rows"]] == [*panel.answers.values()]
    panels = unpack(base64.b64decode(states[1]["curves"]["base64"]))["panels"]
    assert [each["name"] for each in panels] == ["rest_loss", "loss", "entropy"]


def test_ttt_says_what_cannot_be(worker: Worker) -> None:
    panel = TTTPanel(text="", question="", worker=worker)
    with pytest.raises(ValueError, match="the document is empty; 2 to 65,536 tokens are allowed"):
        panel.start().result(SECONDS)
    assert "the document is empty; 2 to 65,536 tokens are allowed" in panel.error
    panel.fields["document"].value = "if x:"
    with refused("a document's tokens", 3):
        panel.start().result(SECONDS)
    assert "the held-out share 33% leaves 2 and 1" in panel.error
    with refused("held_out", 0.95, "from 0 to 0.9"):
        TTTPanel(text=TEXT, worker=worker, held_out=0.95)
    panel.fields["document"].value, panel.fields["lr"].value = TEXT, 0.0
    with pytest.raises(ValueError, match="lr must be above 0"):
        panel.start().result(SECONDS)
    assert not panel.buttons["start"].disabled
    assert worker.call("open", model="tiny-deltanet")["updates"] == 0
