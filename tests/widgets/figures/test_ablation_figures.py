"""Tables and figures of ablations, from rows whose means and ranges are worked out by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from widgets.figures.ablation_figures import reward_by_setting, views

ROWS = pd.DataFrame(
    [
        {"method": "base", "seed": -1, "ntp_loss": 3.0},
        {"method": "sft", "seed": 0, "ntp_loss": 2.0},
        {"method": "sft", "seed": 1, "ntp_loss": 2.2},
        {"method": "refine: 9", "setting": "9", "seed": 0, "ntp_loss": 1.0, "default": False},
        {"method": "refine: 9", "setting": "9", "seed": 1, "ntp_loss": 1.6, "default": False},
        {"method": "refine: 5", "setting": "5", "seed": 0, "ntp_loss": 2.5, "default": True},
    ]
).assign(ablation="k", **{"exact recall word-1 at 512": 0.5, "exact recall number-1 at 512": 1.0})


def test_a_setting_is_drawn_by_its_mean_and_range_beside_sft_and_the_base():
    table, figure = views(ROWS, "k")
    assert list(table.data["method"]) == ["base", "SFT", "REFINE, 9", "REFINE, 5 (recipe)"]
    assert list(table.data["runs"]) == [1, 2, 2, 1]
    assert table.data["NTP loss (nats)"].tolist() == ["3.0000", "2.1000 ± 0.1414", "1.3000 ± 0.4243", "2.5000"]
    traces = {trace.name: trace for trace in figure.data if trace.xaxis == "x" and trace.name}
    refine = traces["REFINE"]
    assert list(refine.x) == ["5", "9"] and list(refine.y) == pytest.approx([2.5, 1.3])
    assert list(refine.error_y.array) == pytest.approx([0, 0.3])
    assert list(refine.error_y.arrayminus) == pytest.approx([0, 0.3])
    assert set(traces["SFT"].y) == {2.1} and set(traces["base"].y) == {3.0}
    assert {trace.y[0] for trace in figure.data if trace.xaxis == "x2"} == {75.0}


def test_the_columns_of_one_ablation_do_not_disturb_another():
    """Answers count questions, and recall counts documents: each table has its own count and warning."""
    answers = {"ablation": "ttt_reward", "setting": "binary", "method": "refine: binary", "seed": 0, "default": False}
    counted = pd.DataFrame([{**answers, "contains_answer": 0.5, "items": 40}])
    rows = pd.concat([ROWS.assign(documents=50), counted], ignore_index=True)
    table, _ = views(rows, "k")
    assert set(table.data["distinct documents"]) == {50} and "distinct questions" not in table.data
    assert "only 50 distinct documents" in table.note
    table, _ = views(rows, "ttt_reward")
    assert table.data["distinct questions"].tolist() == [40] and "distinct documents" not in table.data
    assert "only 40 distinct questions" in table.note


def test_an_ablation_without_a_finished_run_is_a_sentence():
    assert views(ROWS, "reward") == views(pd.DataFrame(), "reward") == ["Reward: no run has finished."]


def test_the_rewards_of_training_have_a_line_for_each_setting():
    steps = pd.DataFrame({"step": [1, 2], "reward_mean": [0.1, 0.3], "reward_std": [0.2, 0.2]})
    seeds = [steps.assign(method="refine: 5", seed=0), steps.assign(method="refine: 5", seed=1, reward_mean=0.5)]
    figure = reward_by_setting(pd.concat([*seeds, steps.assign(method="refine: 9", seed=0)]))
    lines = {(trace.name, trace.xaxis): list(trace.y) for trace in figure.data if trace.mode != "lines"}
    assert lines["k = 5", "x"] == pytest.approx([0.3, 0.4]) and lines["k = 9", "x"] == [0.1, 0.3]
    assert lines["k = 5", "x2"] == [0.2, 0.2] and len(lines) == 4
