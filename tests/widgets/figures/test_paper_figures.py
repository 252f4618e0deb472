"""Tables of the paper's differences beside ours, as text."""

from __future__ import annotations

import pandas as pd
import pytest

from widgets.figures.paper_figures import differences_table

LINE = {
    "table": "table 3",
    "difference": "REFINE – SFT",
    "measure": "MK-NIAH",
    "task": "niah_multikey_1",
    "length": "mean",
    "unit": "%",
    "own": False,
    "paper": 1.5,
    "paper_sign": "+",
    "seeds": 2,
    "mean": 10.0,
    "sd": 14.14,
    "sign": "+",
    "verdict": "same",
    "low": -3.04,
    "high": 23.0,
    "items": 12,
}


@pytest.mark.parametrize(
    ("changes", "text", "interval"),
    [
        ({}, "+10.0 ± 14.1 [−3.0, +23.0], same sign", True),
        ({"sign": "floor unknown", "verdict": ""}, "+10.0 ± 14.1 [−3.0, +23.0], floor unknown", True),
        ({"low": float("nan"), "high": float("nan"), "items": 0}, "+10.0 ± 14.1, same sign", False),
        ({"sign": "floor", "verdict": "", "low": float("nan"), "high": float("nan")}, "floor", False),
    ],
)
def test_a_difference_has_its_spread_interval_and_verdict(changes, text, interval):
    table = differences_table(pd.DataFrame([LINE | changes]))
    (line,) = table.data.to_dict("records")
    assert line["REFINE – SFT: ours"] == text and line["REFINE – SFT: paper"] == "+1.5"
    assert ("95 % interval" in table.caption) == interval
    assert ("only 12 distinct samples" in table.note) == interval
