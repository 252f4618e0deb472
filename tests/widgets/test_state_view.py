"""The views beside the panels: states along a document, rewards at a glance, a notice."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.factories.state_view import summary
from tests.support.refusals import naming, refused
from widgets.core.notice import Notice
from widgets.parts.reward_summary import RewardSummary
from widgets.state_view import StateView


def unpacked(view: StateView, name: str) -> np.ndarray:
    (measure,) = (each for each in view.states["measures"] if each["name"] == name)
    return np.frombuffer(measure["values"], "<f4").reshape(len(view.states["rows"]), -1)


def test_states_are_packed_head_by_head() -> None:
    given = summary()
    view = StateView(given, lambda token: f"token\n{token}")
    rows = view.states["rows"]
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (2, 0)]
    np.testing.assert_array_equal(unpacked(view, "norm"), [given.norms[0, 0], given.norms[0, 1], given.norms[1, 0]])
    np.testing.assert_array_equal(unpacked(view, "change")[:, 1:], given.changes[[0, 0, 1], [0, 1, 0], 1:])
    assert np.frombuffer(view.states["places"], "<u4").tolist() == [0, 4, 9]
    assert [row["writes"] for row in rows] == [-1, -1, 0]  # layer 0 does not tell
    strengths = given.write_strengths[0, 0]
    strongest = rows[2]["strongest"]
    assert strongest[0]["token"] == int(strengths.argmax())
    assert strongest[0]["text"] == f"token⏎{strongest[0]['token']}"
    assert [each["strength"] for each in strongest] == sorted(strengths.tolist(), reverse=True)
    assert repr(view).splitlines()[0] == "StateView: 3 heads at 3 positions, the last after token 9"
    assert "layer 2 recurrent_state head 0" in repr(view)


def test_the_bars_show_the_long_short_difference_of_a_document_that_has_it() -> None:
    difference = np.array([np.nan] * 4 + [0.5, 0, 3, 0, 0, 1], np.float32)
    view = StateView(summary(long_short=difference), str)
    packed = np.frombuffer(view.states["long_short"], "<f4")
    assert packed.tolist() == [0, 0, 0, 0, 0.5, 0, 3, 0, 0, 1]
    assert [each["token"] for each in view.states["largest"][:3]] == [6, 9, 4]
    view.bars = "long_short"
    view.show(summary(long_short=difference))
    assert view.bars == "long_short"
    view.show(summary())
    assert view.bars == "writes" and "long_short" not in view.states


def test_a_row_that_there_is_not_is_refused() -> None:
    view = StateView(summary())
    view.row = 2
    with refused("row", 3, "from 0 to 2"):
        view.row = 3
    view.show(summary(layers=(0, 1)))
    assert view.row == 0
    assert repr(StateView()) == "StateView: no states"


def frame(rewards: list[float]) -> pd.DataFrame:
    columns = {"entropy": [1.0, 2.0, 3.0], "binary": [0.5] * 3, "target_logprob": [-3.0, -1.0, -2.0]}
    return pd.DataFrame({"reward": rewards, **columns})


def test_rewards_at_a_glance() -> None:
    view = RewardSummary(frame([0.0, 0.5, 1.0]), "hybrid")
    facts = view.summary
    assert (facts["mean"], facts["std"], facts["rollouts"]) == (0.5, 0.5, 3)
    assert sum(facts["counts"]) == 3
    assert (facts["edges"][0], facts["edges"][-1]) == (0, 1)
    assert [panel["r"] for panel in facts["panels"]] == [pytest.approx(1), None, pytest.approx(0.5)]
    assert repr(view).splitlines() == [
        "hybrid reward of 3 rollouts: 0.500 ± 0.500",
        "  reward vs entropy: r = +1.00",
        "  reward vs exact-match rate: constant, no correlation",
        "  reward vs logprob of the reference: r = +0.50",
    ]
    assert view.correlations["rollouts"].tolist() == [3, 3, 3]
    view.show(frame([0.25] * 3))  # equal rewards: one bar, and nothing to go with
    assert view.summary["counts"] == [3]
    assert {panel["r"] for panel in view.summary["panels"]} == {None}
    with naming(ValueError, "column 'binary'"):
        view.show(frame([0.0, 0.5, 1.0]).drop(columns="binary"))
    view.show(None)
    assert repr(view) == "RewardSummary: no rollouts"


def test_a_notice() -> None:
    notice = Notice()
    assert repr(notice) == "no messages"
    notice.status, notice.error = "Reading…", "n must be at least 1, got 0"
    assert repr(notice) == "Reading…\nerror: n must be at least 1, got 0"
