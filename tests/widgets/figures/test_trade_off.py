"""The figure of what methods gain and what it costs."""

from __future__ import annotations

import pytest

from widgets.figures.series import KNOWN_METHODS
from widgets.figures.trade_off import benefits_of, trade_off

RECALL = "exact recall number-1 at 512"
ROWS = [
    {"method": "base", "seed": None, "ntp_loss": 2.5, "long_ppl": 18.0, RECALL: 0.6, "cosine": 0.3},
    {"method": "sft", "seed": 0, "ntp_loss": 2.4, "long_ppl": 17.0, RECALL: 0.6, "cosine": 0.3},
    {"method": "sft", "seed": 1, "ntp_loss": 2.2, "long_ppl": 15.0, RECALL: 0.7, "cosine": 0.3},
]


def test_every_method_has_its_mean_and_its_seeds_in_each_panel():
    figure = trade_off(ROWS)
    titles = [note.text.replace("<br>", " ") for note in figure.layout.annotations]
    assert titles == [f"{RECALL} (%), higher is better", "LongPPL, lower is better"]
    means = [trace for trace in figure.data if trace.name == "SFT"]
    assert [(*trace.x, *trace.y) for trace in means] == [pytest.approx((2.3, 65)), pytest.approx((2.3, 16))]
    seeds = [trace for trace in figure.data if trace.name == "SFT seeds"]
    assert [list(trace.y) for trace in seeds] == [pytest.approx([60, 70]), pytest.approx([17, 15])]
    assert {trace.marker.color for trace in (*means, *seeds)} == {KNOWN_METHODS["sft"].colour}
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["base", "SFT"]
    assert not any(trace.name == "base seeds" for trace in figure.data)


def test_a_measure_without_values_has_no_panel_and_none_at_all_is_refused():
    rows = [{**row, "long_ppl": None} for row in ROWS]
    assert [note.text for note in trade_off(rows).layout.annotations] == [f"{RECALL} (%), higher is better"]
    assert benefits_of(rows) == [RECALL] and benefits_of([{"method": "sft", "seed": 0, "ntp_loss": 2.4}]) == []
    with pytest.raises(ValueError, check=lambda error: "trade_off" in str(error)):
        trade_off([{"method": "sft", "seed": 0, "ntp_loss": 2.4, "cosine": 0.3}])
