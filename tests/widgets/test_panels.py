"""The reward explorer without a page: documents, rollouts and rewards through a real worker."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from refine_lab.config import BUILT_IN_REWARDS
from refine_lab.explore.client import Worker
from refine_lab.models import load_model
from refine_lab.training.adaptation import read_prompt
from tests.support.refusals import naming, refused
from tests.support.small_document import SECONDS, TEXT, wait_for, worker  # noqa: F401
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
    assert {"entropy", "loss", "logprob", "rank", "chance", "reward"} == metrics.keys()
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
    assert (
        "grouping by prefix needs at least 2 rollouts per position (RefineConfig.group_size), got 1" in explorer.error
    )
    assert explorer.controls["group_size"].value == explorer.exploration.refine.group_size == 8
    with pytest.raises(ValueError, match="too close to the end"):
        explorer.explore(10_000).result(SECONDS)
    assert "too close to the end" in explorer.error
    with pytest.raises(ValueError, match="the document is empty; 2 to 65,536 tokens are allowed"):
        explorer.read("").result(SECONDS)
    assert explorer.token_map.text.text == TEXT
    explorer.change("reward", "hybrid").result(SECONDS)
    assert explorer.error == ""
    with naming(ValueError, "control", "'tua'"):
        explorer.change("tua", 1)


def test_what_the_page_does_wrong_is_shown(explorer: RewardExplorer) -> None:
    """By method of the page's callbacks, which end well although what they began does not."""
    explorer.token_map.selected = len(explorer.token_map.text) - 1
    assert "too close to the end" in explorer.error
    explorer._on_upload({"new": [{"name": "empty.txt", "content": b""}]})
    assert "the document is empty; 2 to 65,536 tokens are allowed" in explorer.error
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
    with refused("group_size", 128, "a whole number from 1 to 64"):
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
    wait_for(lambda: "entropy_change" not in shown.metrics)
    assert explorer._compare_field.value == "no-such-model", "what was typed can be corrected"
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
    assert explorer._compare_field.value == str(tmp_path)
    assert "entropy_change" not in explorer.token_map.metrics
    assert explorer.token_map.metrics["reward"].values.size == len(explorer.token_map.text)


def test_lone_surrogates_are_read(worker: Worker) -> None:
    made = RewardExplorer(text=TEXT + "\ud83d", worker=worker)
    made.shown.result(SECONDS)
    made.read(TEXT + "\udc00").result(SECONDS)
    assert made.token_map.text.text.endswith("\ufffd")


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
