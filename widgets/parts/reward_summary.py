"""Summarises the rewards of many rollouts: their distribution and correlations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import traitlets

from refine_lab.explore.rollouts import CORRELATED, correlations
from widgets.core.base import Widget
from widgets.core.packing import PACKED

BINS = 24
MOST_POINTS = 4000
"""Maximum number of points in a scatter plot; larger sets are subsampled."""


class RewardSummary(Widget):
    """The distribution of rewards, and their correlation with entropy, exact match and the reference's logprob.

    `rollouts`: a frame of `explore.rollouts.rollout_frame`; nothing is shown for none. All statistics use every rollout at the
    selected positions, regardless of any list's filters. Rollouts with a true `clicked` column are drawn separately.
    """

    page_heading = "Rewards"

    summary = traitlets.Dict().tag(**PACKED)
    "Histogram, mean and spread of the rewards, and a scatter plot for each correlated quantity."
    passing = traitlets.Bytes().tag(sync=True)
    "One byte per rollout, 1 if it passes the filters of the list; others are drawn pale. Empty: all pass."

    def __init__(self, rollouts: pd.DataFrame | None = None, reward: str = "reward") -> None:
        super().__init__()
        self.show(rollouts, reward)

    def show(self, rollouts: pd.DataFrame | None, reward: str = "reward") -> None:
        """Shows other rollouts; `reward` is the axis label. Raises ValueError for a frame without the required columns."""
        self.correlations = pd.DataFrame(columns=["with", "r", "rollouts"])
        "As returned by `explore.rollouts.correlations`."
        if rollouts is None or rollouts.empty:
            self.summary, self.passing = {}, b""
            return
        for column in ("reward", *(column for column, _ in CORRELATED.values())):
            if column not in rollouts:
                raise ValueError(f"rollouts must have a column {column!r}, got {', '.join(map(str, rollouts))}")
        clicked = rollouts["clicked"].to_numpy(bool) if "clicked" in rollouts else np.zeros(len(rollouts), bool)
        selected = rollouts[~clicked]
        values = selected["reward"].to_numpy(dtype=float)
        counts, edges = np.histogram(values, bins=BINS if values.std() > 1e-12 else 1)
        self.correlations = correlations(selected)
        stride = -(-len(rollouts) // MOST_POINTS)
        panels = []
        for name, r, _ in self.correlations.itertuples(index=False):
            column, unit = CORRELATED[name]
            x = rollouts[column].to_numpy(dtype="<f4")[::stride]
            panels.append({"title": name, "unit": unit, "x": x.tobytes(), "r": None if np.isnan(r) else float(r)})
        self.passing = b""
        positions = selected["position"].nunique() if "position" in selected else 0
        std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        rewards, apart = rollouts["reward"].to_numpy("<f4").tobytes(), clicked.astype("u1").tobytes()
        facts = {"reward": reward, "rollouts": len(selected), "positions": positions}
        histogram = {"mean": float(values.mean()), "std": std, "counts": counts.tolist(), "edges": edges.tolist()}
        self.summary = facts | histogram | {"y": rewards, "apart": apart, "stride": stride, "panels": panels}

    def __repr__(self) -> str:
        if not self.summary:
            return "RewardSummary: no rollouts"
        facts = self.summary
        where = f" at {facts['positions']} sampled positions" if facts["positions"] else ""
        spread = f"{facts['mean']:.3f} ± {facts['std']:.3f}"
        lines = [f"{facts['reward']} reward of {facts['rollouts']} rollouts{where}: {spread}"]
        for panel in facts["panels"]:
            r = "constant, no correlation" if panel["r"] is None else f"r = {panel['r']:+.2f}"
            lines.append(f"  reward vs {panel['title']}: {r}")
        return "\n".join(lines)
