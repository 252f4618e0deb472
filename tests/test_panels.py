"""The panels without a page: documents, rollouts and test-time training through a real worker."""

from __future__ import annotations

import time
from collections.abc import Iterator

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
    assert panel.fields["weights"].value == "weights: moved by 3 updates; Reset puts them back"
    assert panel.reset().result(SECONDS) == 3
    assert worker.call("fingerprint", model="tiny-deltanet") == before
    assert panel.fields["weights"].value == "weights: as loaded"


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
