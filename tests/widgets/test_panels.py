"""The panels without a page: documents, rollouts and test-time training through a real worker."""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
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
from tests.support.refusals import naming, refused
from tests.support.small_document import SECONDS, TEXT, worker  # noqa: F401
from widgets.core.packing import unpack
from widgets.reward_explorer import RewardExplorer
from widgets.ttt_panel import TTTPanel

pytestmark = pytest.mark.process


@pytest.fixture
def explorer(worker: Worker) -> RewardExplorer:
    made = RewardExplorer(text=TEXT, worker=worker)
    made.read().result(SECONDS)
    return made


def test_a_document_is_shown_with_rollouts_at_the_targets(explorer: RewardExplorer) -> None:
    assert explorer.token_map.text.text == TEXT
    targets = explorer.exploration.targets()
    assert sorted(set(explorer.inspector.rollouts["position"])) == targets
    assert len(explorer.inspector.rollouts) == 8 * len(targets)
    metrics = explorer.token_map.metrics
    assert {"entropy", "loss", "logprob", "difference", "rank", "chance", "reward"} == metrics.keys()
    means = explorer.inspector.rollouts.groupby("position")["reward"].mean()
    for position in targets:
        assert metrics["reward"].values[position + 1] == pytest.approx(means[position], abs=1e-5)
    assert np.isfinite(metrics["reward"].values).sum() == len(targets)
    assert explorer.summary.summary["rollouts"] == 8 * len(targets)
    assert explorer.error == ""
    assert f"64 rollouts at {len(targets)} sampled positions, mean cosine reward" in explorer.notice.status


def test_a_selected_token_shows_its_rollouts(explorer: RewardExplorer) -> None:
    token = 77
    explorer.token_map.selected = token
    deadline = time.monotonic() + SECONDS
    while explorer.inspector.filters.get("position") != [token - 1, token - 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    shown = explorer.inspector.filtered()
    assert shown["position"].tolist() == [token - 1] * 8
    assert all(
        ids == explorer.exploration.document.token_ids[token : token + 5].tolist() for ids in shown["target_ids"]
    )  # type: ignore[union-attr]
    other = explorer.inspector.rollouts["position"].iloc[0]
    explorer.inspector.selected = 0
    assert explorer.token_map.selected == other + 1


def test_a_what_if_changes_the_same_rollouts(explorer: RewardExplorer) -> None:
    before = explorer.inspector.rollouts
    explorer.change("reward", "binary").result(SECONDS)
    after = explorer.inspector.rollouts
    assert after["rollout_ids"].tolist() == before["rollout_ids"].tolist()
    assert after["reward"].tolist() == before["binary"].tolist()
    explorer.change("selection", "argmax").result(SECONDS)
    assert explorer.exploration.targets() == explorer.inspector.rollouts["position"].unique().tolist()
    explorer.controls["group_by"].value = "sequence"  # as a hand on the page does
    assert explorer.exploration.refine.group_by == "sequence"


def test_the_last_of_several_changes_counts(worker: Worker) -> None:
    """Changed while rollouts are made: those that come are of settings that no longer hold."""
    explorer = RewardExplorer(text=TEXT, worker=worker)
    deadline = time.monotonic() + SECONDS
    while explorer.exploration.document is None and time.monotonic() < deadline:
        time.sleep(0.001)
    explorer.change("group_size", 7).result(SECONDS)  # before the first of them
    explorer.shown.result(SECONDS)
    assert set(explorer.inspector.rollouts.groupby("position").size()) == {7}
    changes = [explorer.change("group_size", n) for n in (9, 10, 11)]
    assert [change.exception(SECONDS) for change in changes] == [None] * 3
    assert set(explorer.inspector.rollouts.groupby("position").size()) == {11}
    assert explorer.error == ""


def test_what_cannot_be_is_said_and_changes_nothing(explorer: RewardExplorer) -> None:
    explorer.controls["group_size"].value = 1  # with groups of one prefix there is nothing to compare
    assert "RefineConfig.group_size" in explorer.error
    assert explorer.controls["group_size"].value == explorer.exploration.refine.group_size == 8
    with pytest.raises(ValueError, match="too close to the end"):
        explorer.explore(10_000).result(SECONDS)
    assert "too close to the end" in explorer.error
    with pytest.raises(ValueError, match="a document's tokens must be from 2"):
        explorer.read("").result(SECONDS)
    assert explorer.token_map.text.text == TEXT
    explorer.change("reward", "hybrid").result(SECONDS)
    assert explorer.error == ""
    with naming(ValueError, "control", "'tua'"):
        explorer.change("tua", 1)


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_page_does_wrong_is_shown(explorer: RewardExplorer) -> None:
    """By method of the page's callbacks, which end well although what they began does not."""
    explorer.token_map.selected = len(explorer.token_map.text) - 1
    assert "too close to the end" in explorer.error
    explorer._on_upload({"new": [{"name": "empty.txt", "content": b""}]})
    assert "a document's tokens must be from 2" in explorer.error
    explorer._on_upload({"new": [{"name": "mine.txt", "content": "Köln".encode("latin-1")}]})
    assert explorer.error == "'mine.txt' is not UTF-8 text: invalid start byte at byte 1"

    def broken(inputs):
        return inputs.logprobs.sum(-1) / 0

    explorer.exploration.rewards["broken"] = broken
    explorer.controls["reward"].options = [*explorer.exploration.rewards]
    explorer.controls["reward"].value = "broken"
    wait_for(lambda: "reward 'broken' must be finite" in explorer.error)


def test_a_reward_of_ones_own_may_be_slow_or_wrong(worker: Worker) -> None:
    """Nobody waits for it but its own thread; what it raises is named, also where it would end the process."""
    go_on = threading.Event()

    def slow(inputs):
        assert go_on.wait(SECONDS)
        return inputs.logprobs.sum(-1)

    def wrong(inputs):
        raise KeyError("mine")

    def ends(inputs):
        sys.exit(3)

    explorer = RewardExplorer(text=TEXT, rewards=[slow, wrong, ends], worker=worker)
    explorer.shown.result(SECONDS)
    before = explorer.inspector.rollouts["reward"].to_list()
    asked = explorer.change("reward", "slow")
    assert not asked.done() and explorer.inspector.rollouts["reward"].to_list() == before
    assert worker.call("as_loaded", model="tiny-deltanet"), "others are answered meanwhile"
    overtaken = explorer.change("reward", "binary")
    overtaken.result(SECONDS)
    go_on.set()
    asked.result(SECONDS)
    shown = explorer.inspector.rollouts
    assert shown["reward"].to_list() == shown["binary"].to_list(), "what was asked for last"
    explorer.change("reward", "slow").result(SECONDS)
    assert explorer.inspector.rollouts["reward"].to_list() == pytest.approx([sum(row) for row in shown["logprobs"]])
    for name, said in (("wrong", "KeyError: 'mine'"), ("ends", "SystemExit: 3")):
        with pytest.raises(RuntimeError, match=f"reward '{name}' raised {said}"):
            explorer.change("reward", name).result(SECONDS)
        assert explorer.error == f"RuntimeError: reward '{name}' raised {said}"
    explorer.change("reward", "cosine").result(SECONDS)
    assert explorer.error == "" and explorer.inspector.rollouts["reward"].to_list() == before
    explorer.close()


def test_another_document_begins_anew(explorer: RewardExplorer) -> None:
    explorer.explore(50).result(SECONDS)
    assert len(explorer.inspector.filtered()) == 8
    explorer.read(TEXT + "x = 1\n").result(SECONDS)
    assert explorer.inspector.filters == {}
    assert len(explorer.inspector.filtered()) == len(explorer.inspector.rollouts) == 64


def test_the_newest_click_counts(explorer: RewardExplorer) -> None:
    explorer.explore(30).result(SECONDS)
    slow, quick = explorer.explore(100), explorer.explore(30)  # the second is kept already
    slow.result(SECONDS), quick.result(SECONDS)
    assert explorer.inspector.filters == {"position": [30, 30]}
    assert explorer.token_map.selected == 31


def test_targets_stand_in_their_own_chunk_of_the_map(explorer: RewardExplorer) -> None:
    for seed in range(6):
        explorer.change("seed", seed).result(SECONDS)
        shown = explorer.token_map.document
        chunks = [int(np.searchsorted(shown["chunk_borders"], token, side="right")) for token, _ in shown["targets"]]
        assert chunks == list(range(1, 9))


def test_settings_are_what_the_controls_show(worker: Worker) -> None:
    settings = {"reward": "binary", "group_by": "sequence", "selection": "uniform", "group_size": 3}
    made = RewardExplorer(text=TEXT, worker=worker, settings=settings)
    assert {name: made.controls[name].value for name in settings} == settings
    assert made.controls["reward"].options == BUILT_IN_REWARDS
    made.shown.result(SECONDS)
    with refused("group_size", 128, "from 1 to 64"):
        made.change("group_size", 128)
    made.read("x = 1\n" * 9).result(SECONDS)
    with pytest.raises(ValueError, match=r"too close to the end|too short for a rollout"):
        made.change("rollout_length", 64)
    assert made.exploration.refine.rollout_length == made.controls["rollout_length"].value == 5


def test_the_change_to_another_step_or_model(worker: Worker, explorer: RewardExplorer, tmp_path: Path) -> None:
    """Another model's reading minus this one's, of every document that follows, until none is asked for."""
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.5)
    policy.save_pretrained(tmp_path / "step-7")
    tokenizer.save_pretrained(tmp_path / "step-7")
    explorer.compare(str(tmp_path / "step-7")).result(SECONDS)
    shown = explorer.token_map
    assert shown.metric == "entropy_change"
    assert shown.metrics["entropy_change"].title == "Difference in entropy: step-7 minus this model"
    ids = torch.from_numpy(explorer.exploration.document.token_ids).long()
    expected = read_prompt(policy, ids).entropies.numpy() - shown.metrics["entropy"].values[1:]
    np.testing.assert_allclose(shown.metrics["entropy_change"].values[1:], expected, atol=1e-4)
    assert {"loss_change", "reward"} <= shown.metrics.keys()
    explorer.read(TEXT + "print(area(1, 2))\n").result(SECONDS)
    wait_for(lambda: len(shown.metrics.get("loss_change", shown.metrics["loss"]).values) == len(shown.text))
    wait_for(lambda: "entropy_change" in shown.metrics)
    explorer.compare(None).result(SECONDS)
    assert "entropy_change" not in shown.metrics
    explorer.compare(str(tmp_path / "step-7")).result(SECONDS)
    with pytest.raises(FileNotFoundError):
        explorer.compare("no-such-model").result(SECONDS)
    assert "no-such-model" in explorer.error
    wait_for(lambda: explorer._compare_field.value == "" and "entropy_change" not in shown.metrics)
    explorer.read(TEXT).result(SECONDS)
    assert explorer.error == ""


def test_a_comparison_asked_for_before_the_first_reading(worker: Worker) -> None:
    made = RewardExplorer(text=TEXT, worker=worker)
    made.compare("tiny-deltanet").result(SECONDS)
    assert made.token_map.metric == "entropy_change"
    np.testing.assert_array_equal(made.token_map.metrics["entropy_change"].values[1:], 0.0)


def test_a_model_with_other_tokens_is_no_comparison(worker: Worker, explorer: RewardExplorer, tmp_path: Path) -> None:
    """One that knows the first document's tokens as they are, and cuts the second one otherwise."""
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-200]
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    explorer.read("a b c d e f g h i j k l m n o p\n" * 9).result(SECONDS)
    explorer.compare(str(tmp_path)).result(SECONDS)
    words = " ".join(tokenizer.convert_ids_to_tokens(range(len(tokenizer) - 150, len(tokenizer)))).replace(
        "\u0120", " "
    )
    with pytest.raises(
        ValueError, match="a model to compare with must be one that tokenises this document identically"
    ):
        explorer.read(words).result(SECONDS)
    assert "tokenises this document identically" in explorer.error
    assert explorer._compare_field.value == ""
    assert "entropy_change" not in explorer.token_map.metrics
    assert explorer.token_map.metrics["reward"].values.size == len(explorer.token_map.text)


def test_lone_surrogates_are_read(worker: Worker) -> None:
    made = RewardExplorer(text=TEXT + "\ud83d", worker=worker)
    made.shown.result(SECONDS)
    made.read(TEXT + "\udc00").result(SECONDS)
    assert made.token_map.text.text.endswith("\ufffd")


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
    assert panel.answers.keys() == {"before", "after"}
    change = panel.token_map.metrics["entropy_change"].values
    expected = panel.steps[-1]["entropy"] - panel.steps[0]["entropy"]
    assert np.nanmean(change) == pytest.approx(expected, abs=1e-4)
    assert [each["name"] for each in panel.curves.curves["panels"]][:2] == ["loss", "entropy"]
    assert worker.call("fingerprint", model="tiny-deltanet") != before
    wait_for(lambda: panel.fields["weights"].value == "Adapted (3 updates). Reset restores the original weights.")
    other = TTTPanel(text=TEXT, worker=worker)  # which did not move them, and says so
    wait_for(lambda: "Adapted (3 updates)" in other.fields["weights"].value)
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
    for again in (panel.start, panel.reset):
        with pytest.raises(ValueError, match="this panel is already adapting"):
            again()
    with pytest.raises(ValueError, match="the model is being adapted: stop the adaptation first"):
        other.reset().result(SECONDS)
    panel._pressed("start")  # a second click
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
    assert panel._held == HeldOutRest(first=first, stop=len(ids)) and len(panel._ids) > len(ids)
    levels = [read_prompt(policy, ids).losses]
    with adapted(policy, ids[:first], panel.config, lambda _: levels.append(read_prompt(policy, ids).losses)):
        pass
    rests = [float(losses[first - 1 :].mean()) for losses in levels]
    assert [row["rest_loss"] for row in panel.steps] == pytest.approx(rests, abs=1e-4)
    assert [row["loss"] for row in panel.steps] == pytest.approx(
        [float(x[: first - 1].mean()) for x in levels], abs=1e-4
    )
    assert panel.rest.change.value == pytest.approx(rests[-1] - rests[0], abs=1e-4)
    assert panel.rest.sentence in repr(panel) and panel.result.verdict == panel.rest.verdict
    assert panel.result.interval == [panel.rest.interval[0], panel.rest.change.value, panel.rest.interval[1]]
    assert panel.token_map.metric == "rest_change"
    coloured = np.flatnonzero(np.isfinite(panel.token_map.metrics["rest_change"].values))
    assert coloured.tolist() == [*range(first, len(ids))]
    loss = panel.curves.curves["panels"][0]
    assert [(line["method"], line["front"]) for line in loss["lines"]] == [("rest_loss", True), ("loss", False)]


def test_a_rate_that_harms_the_rest_is_no_gain(worker: Worker) -> None:
    """The adapted part falls while the rest, another text, rises."""
    text = "The red fox sleeps in the den. " * 30 + sample_document().document[:900]
    panel = TTTPanel(text=text, worker=worker, config=TTTConfig(refine=None, steps=4, lr=3e-3), held_out=0.4)
    panel.start().result(SECONDS)
    assert (
        panel.steps[-1]["loss"] < panel.steps[0]["loss"] and panel.steps[-1]["rest_loss"] > panel.steps[0]["rest_loss"]
    )
    assert panel.result.verdict == "no gain beyond noise, and the loss rises"
    panel.fields["held_out"].value = 0
    panel.start().result(SECONDS)
    assert panel.rest is None and panel.result.verdict == "" and "rest_loss" not in panel.steps[0]
    panel.reset().result(SECONDS)


def test_ttt_after_a_step_that_failed(worker: Worker) -> None:
    """A decay of the weights by a factor of -9 a step makes the gradient NaN after a few steps."""
    panel = TTTPanel(text=TEXT, config=TTTConfig(steps=60, lr=10, weight_decay=1), worker=worker)
    with pytest.raises(FloatingPointError):
        panel.start().result(SECONDS)
    assert "try an lr below 10" in panel.error
    wait_for(lambda: "Adapted" in panel.fields["weights"].value)
    panel.reset().result(SECONDS)
    assert "Original weights restored exactly" in panel.notice.status


def test_rollouts_of_moved_weights_are_refused(worker: Worker, explorer: RewardExplorer) -> None:
    panel = TTTPanel(text=TEXT, worker=worker)
    panel.fields["steps"].value = 1
    panel.start().result(SECONDS)
    with pytest.raises(ValueError, match="the weights have changed since this document was read: read it again"):
        explorer.explore(61).result(SECONDS)
    explorer.read().result(SECONDS)
    explorer.explore(61).result(SECONDS)
    panel.reset().result(SECONDS)
    with pytest.raises(ValueError, match="the weights have changed since"):
        explorer.explore(62).result(SECONDS)


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
    assert (panel._ids.tolist(), panel._adapted) == (ids[:200], 150)
    assert len(panel.token_map.text) == 200
    panel.reset().result(SECONDS)
    panel.fields["held_out"].value = 40
    panel.start().result(SECONDS)
    assert panel._ids.tolist() == ids[:200] and panel._held == HeldOutRest(first=90, stop=150)
    panel.reset().result(SECONDS)
    panel.fields["question"].value, panel.fields["held_out"].value = " other", 0
    panel.start().result(SECONDS)
    assert panel._adapted < len(panel._ids) < 200
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
    assert panel.answers == {"before": "", "after": ""}
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
    moved = "Adapted (2 updates). Reset restores the original weights."
    wait_for(lambda: [panel.fields["weights"].value for panel in (one, other)] == [moved] * 2)
    assert other.reset().result(SECONDS) == 2
    wait_for(lambda: [panel.fields["weights"].value for panel in (one, other)] == ["Original weights."] * 2)


def test_a_page_of_ttt_holds_the_answers(worker: Worker, tmp_path: Path) -> None:
    panel = TTTPanel(text=TEXT, question="area", worker=worker, config=TTTConfig(refine=None, steps=1, lr=1e-4))
    panel.start().result(SECONDS)
    panel.reset().result(SECONDS)
    page = panel.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    states = [part["state"] for part in json.loads(data)["widgets"]]
    assert f"{states[0]['verdict']}: {states[0]['details']}".casefold() == panel.rest.sentence.casefold()
    assert {when: states[2][when] for when in ("before", "after")} == panel.answers
    loss, entropy = unpack(base64.b64decode(states[1]["curves"]["base64"]))["panels"]
    assert [line["method"] for line in loss["lines"]] == ["rest_loss", "loss"] and entropy["name"] == "entropy"


def test_ttt_says_what_cannot_be(worker: Worker) -> None:
    panel = TTTPanel(text="", question="", worker=worker)
    with pytest.raises(ValueError, match="a document's tokens must be from 2"):
        panel.start().result(SECONDS)
    assert "a document's tokens must be from 2" in panel.error
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
