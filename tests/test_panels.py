"""The panels without a page: documents, rollouts and test-time training through a real worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from refine_lab.explore import Worker
from widgets.reward_explorer import RewardExplorer
from widgets.ttt_panel import TTTPanel

pytestmark = pytest.mark.process

TEXT = "def area(width, height):\n    return width * height\n\n" * 12
SECONDS = 120


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker("cpu")
    yield made
    made.close()


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
    assert f"64 rollouts at {len(targets)} positions" in explorer.notice.status


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
    marked = set(explorer.exploration.targets())
    assert marked <= set(explorer.inspector.rollouts["position"])
    explorer.controls["group_by"].value = "sequence"  # as a hand on the page does
    assert explorer.exploration.method.group_by == "sequence"


def test_what_cannot_be_is_said_and_changes_nothing(explorer: RewardExplorer) -> None:
    explorer.controls["group_size"].value = 1  # with groups of one prefix there is nothing to compare
    assert "group_by 'prefix' compares rollouts of one position" in explorer.error
    assert explorer.controls["group_size"].value == explorer.exploration.method.group_size == 8
    with pytest.raises(ValueError, match="no rollout can start there"):
        explorer.explore(10_000).result(SECONDS)
    assert "no rollout can start there" in explorer.error
    with pytest.raises(ValueError, match="a document's tokens must be from 2"):
        explorer.read("").result(SECONDS)
    assert explorer.token_map.text.text == TEXT
    explorer.change("reward", "hybrid").result(SECONDS)
    assert explorer.error == ""
    with pytest.raises(ValueError, match=r"a control must be one of reward, group_by, .*, got 'tua'"):
        explorer.change("tua", 1)


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_page_does_wrong_is_shown(explorer: RewardExplorer) -> None:
    """By way of the page's callbacks, which end well although what they began does not."""
    explorer.token_map.selected = len(explorer.token_map.text) - 1
    assert "no rollout can start there" in explorer.error
    explorer._on_upload({"new": [{"content": b""}]})
    assert "a document's tokens must be from 2" in explorer.error

    def broken(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
        return logprobs.sum(-1) / 0

    explorer.exploration.rewards["broken"] = broken
    explorer.controls["reward"].options = [*explorer.exploration.rewards]
    explorer.controls["reward"].value = "broken"
    assert "reward 'broken' must be finite" in explorer.error


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
    made.shown.result(SECONDS)
    with pytest.raises(ValueError, match="group_size must be from 1 to 64, got 128"):
        made.change("group_size", 128)
    made.read("x = 1\n" * 9).result(SECONDS)
    with pytest.raises(ValueError, match=r"no rollout can start|no room for a rollout"):
        made.change("rollout_length", 64)
    assert made.exploration.method.rollout_length == made.controls["rollout_length"].value == 5


def test_lone_surrogates_are_read(worker: Worker) -> None:
    made = RewardExplorer(text=TEXT + "\ud83d", worker=worker)
    made.shown.result(SECONDS)
    made.read(TEXT + "\udc00").result(SECONDS)
    assert made.token_map.text.text.endswith("\ufffd")


@pytest.mark.parametrize("method", ["REFINE", "SFT"])
def test_ttt_start_and_reset(worker: Worker, method: str) -> None:
    before = worker.call("fingerprint", model="tiny-deltanet")
    panel = TTTPanel(text=TEXT, question="area", worker=worker)
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
    wait_for(lambda: panel.fields["weights"].value == "weights: moved by 3 updates; Reset puts them back")
    other = TTTPanel(text=TEXT, worker=worker)  # which did not move them, and says so
    wait_for(lambda: "moved by 3 updates" in other.fields["weights"].value)
    assert panel.reset().result(SECONDS) == 3
    assert worker.call("fingerprint", model="tiny-deltanet") == before
    wait_for(lambda: panel.fields["weights"].value == "weights: as loaded")


def test_ttt_refuses_what_would_lose_the_weights(worker: Worker) -> None:
    before = worker.call("fingerprint", model="tiny-deltanet")
    panel, other = TTTPanel(text=TEXT, worker=worker), TTTPanel(text=TEXT, worker=worker)
    panel.stop()  # nothing runs: nothing happens
    assert panel.notice.status == ""
    panel.fields["steps"].value = 10_000
    chain = panel.start()
    wait_for(lambda: len(panel.steps) >= 2)
    for again in (panel.start, panel.reset):
        with pytest.raises(ValueError, match="this panel is adapting already"):
            again()
    with pytest.raises(ValueError, match="the model is being adapted: stop that first"):
        other.reset().result(SECONDS)
    panel._pressed("start")  # a second click
    assert "this panel is adapting already" in panel.error
    panel.stop()
    chain.result(SECONDS)
    panel.reset().result(SECONDS)
    assert worker.call("fingerprint", model="tiny-deltanet") == before
    assert worker.call("as_loaded", model="tiny-deltanet") is True


def test_ttt_after_a_step_that_failed(worker: Worker) -> None:
    panel = TTTPanel(text=TEXT, worker=worker)
    panel.fields["lr"].value, panel.fields["steps"].value = 1e6, 20
    with pytest.raises((FloatingPointError, ValueError)):
        panel.start().result(SECONDS)
    assert panel.error != ""
    wait_for(lambda: "moved by" in panel.fields["weights"].value)
    panel.reset().result(SECONDS)
    assert "bit for bit" in panel.notice.status


def test_rollouts_of_moved_weights_are_refused(worker: Worker, explorer: RewardExplorer) -> None:
    panel = TTTPanel(text=TEXT, worker=worker)
    panel.fields["steps"].value = 1
    panel.start().result(SECONDS)
    with pytest.raises(ValueError, match="the weights have moved since this document was read: read it again"):
        explorer.explore(61).result(SECONDS)
    explorer.read().result(SECONDS)
    explorer.explore(61).result(SECONDS)
    panel.reset().result(SECONDS)
    with pytest.raises(ValueError, match="the weights have moved since"):
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


def test_ttt_says_what_cannot_be(worker: Worker) -> None:
    panel = TTTPanel(text="", question="", worker=worker)
    with pytest.raises(ValueError, match="a document's tokens must be from 2"):
        panel.start().result(SECONDS)
    assert "a document's tokens must be from 2" in panel.error
    panel.fields["document"].value, panel.fields["lr"].value = TEXT, 0.0
    with pytest.raises(ValueError, match="lr must be above 0"):
        panel.start().result(SECONDS)
    assert not panel.buttons["start"].disabled
    assert worker.call("open", model="tiny-deltanet")["updates"] == 0
