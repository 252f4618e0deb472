"""What the reward explorer's figures are of, and that nothing in them depends on what was asked before."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from refine_lab.config import BUILT_IN_SELECTIONS
from refine_lab.explore.client import Worker
from tests.support.small_document import SECONDS, TEXT, worker  # noqa: F401
from widgets.reward_explorer import RewardExplorer

pytestmark = pytest.mark.process


@pytest.fixture
def explorer(worker: Worker) -> RewardExplorer:
    made = RewardExplorer(text=TEXT, worker=worker)
    made.shown.result(SECONDS)
    return made


def shown_of(explorer: RewardExplorer) -> pd.DataFrame:
    """The rollouts at selected positions, after the figures were held against them."""
    frame = explorer.inspector.rollouts
    selected = frame[~frame["clicked"]]
    facts = explorer.summary.summary
    assert selected["position"].unique().tolist() == explorer.exploration.targets()
    assert (facts["rollouts"], facts["positions"]) == (len(selected), selected["position"].nunique())
    assert facts["mean"] == pytest.approx(selected["reward"].mean())
    assert sum(facts["counts"]) == len(selected)
    if selected["entropy"].nunique() > 1 and selected["reward"].nunique() > 1:
        r = np.corrcoef(selected["reward"], selected["entropy"])[0, 1]
        assert explorer.summary.correlations.set_index("with").loc["entropy", "r"] == pytest.approx(r)
    where = f"{facts['positions']} sampled position{'s' if facts['positions'] > 1 else ''}"
    assert f"{len(selected)} rollouts at {where}, " in explorer.notice.status
    assert f"mean {explorer.exploration.reward} reward {selected['reward'].mean():.3f}" in explorer.notice.status
    return selected.reset_index(drop=True)


def test_figures_are_of_the_positions_that_the_settings_select(explorer: RewardExplorer) -> None:
    """Of these alone, whatever was selected or clicked before, and whatever the list filters: rules can be compared."""
    first = shown_of(explorer)
    for name, value in (("selection", "uniform"), ("num_chunks", 12), ("seed", 4), ("num_chunks", 3)):
        explorer.change(name, value).result(SECONDS)
        assert len(shown_of(explorer)) == 8 * explorer.exploration.refine.num_chunks
    token = next(token for token in range(40, 80) if token - 1 not in explorer.exploration.targets())
    explorer.explore(token - 1).result(SECONDS)
    shown_of(explorer)
    assert "; 8 rollouts at 1 clicked position, excluded from all statistics, exact match " in explorer.notice.status
    assert f"position {token - 1}, clicked" in repr(explorer.inspector)
    apart = np.frombuffer(explorer.summary.summary["apart"], "u1")
    assert apart.sum() == 8
    np.testing.assert_array_equal(
        np.frombuffer(explorer.summary.passing, "u1"), apart
    )  # the list shows the clicked ones
    explorer.inspector.filters = {"reward": [0.2, None]}
    passing = explorer.inspector.rollouts["reward"].to_numpy(np.float32) >= np.float32(0.2)
    np.testing.assert_array_equal(np.frombuffer(explorer.summary.passing, "u1"), passing)
    shown_of(explorer)
    for name, value in (("selection", "entropy"), ("num_chunks", 8), ("seed", 0)):
        explorer.change(name, value).result(SECONDS)
    pd.testing.assert_frame_equal(shown_of(explorer), first, check_exact=True)


def test_twenty_random_settings_and_back(explorer: RewardExplorer) -> None:
    """The same rollouts bit for bit, with rewards, logprobs and cosines; also in a worker that was asked for nothing else."""
    draw = np.random.default_rng(11)
    names = {
        "rollout_length": lambda: int(draw.integers(1, 12)),
        "group_size": lambda: int(draw.integers(2, 12)),
        "temperature": lambda: float(draw.choice([0.7, 1.0])),
        "num_chunks": lambda: int(draw.integers(1, 9)),
        "selection": lambda: str(draw.choice(BUILT_IN_SELECTIONS)),
        "seed": lambda: int(draw.integers(0, 3)),
        "reward": lambda: str(draw.choice(["cosine", "binary", "hybrid"])),
    }
    before, start = shown_of(explorer), {name: explorer.exploration.settings[name] for name in names}
    for _ in range(20):
        name = str(draw.choice([*names]))
        explorer.change(name, names[name]()).result(SECONDS)
        explorer.explore(int(draw.integers(0, 100))).result(SECONDS)
        shown_of(explorer)
    for name, value in start.items():
        explorer.change(name, value).result(SECONDS)
    pd.testing.assert_frame_equal(shown_of(explorer), before, check_exact=True)
    other = Worker("cpu")
    try:
        fresh = RewardExplorer(text=TEXT, worker=other)
        fresh.shown.result(SECONDS)
        pd.testing.assert_frame_equal(shown_of(fresh), before, check_exact=True)
    finally:
        other.close()
