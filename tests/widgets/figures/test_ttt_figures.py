"""Figures and tables of adapting to one prompt: values by hand, texts as data, nothing empty."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from refine_lab.statistics.rest_change import RestChange, rest_change
from widgets.figures import ttt_figures
from widgets.figures.plots import check_figures
from widgets.figures.ttt_figures import FALL, RISE, EntropyText, entropy_change

TOKENS = ["a", " <b>", "c\n", "d", "e"]
PAIRS = [(method, step) for method in ("sft", "refine") for step in (1, 2)]
BEFORE, AFTER = [1.0, 2.0, 3.0, 2.0], [0.5, 2.0, 3.5, 1.0]


def test_entropy_before_after_and_its_change():
    figure = entropy_change(BEFORE, {"sft": AFTER}, TOKENS, question_start=3, smoothing=1)
    traces = {(trace.name, trace.yaxis): trace for trace in figure.data}
    assert set(traces) == {("baseline (no adaptation)", "y"), ("SFT", "y"), ("SFT", "y2")}
    assert list(traces[("SFT", "y2")].y) == [-0.5, 0.0, 0.5, -1.0]
    assert list(traces[("SFT", "y")].x) == [1, 2, 3, 4]  # of token i + 1
    assert traces[("SFT", "y")].text[0] == "·&lt;b&gt;"
    assert next(shape.x0 for shape in figure.layout.shapes if shape.type == "line" and shape.x0 == shape.x1) == 2.5
    check_figures(figure)


def test_entropies_are_means_over_their_neighbours_fewer_at_the_ends():
    figure = entropy_change(BEFORE, {"sft": AFTER}, TOKENS, smoothing=3)
    assert list(figure.data[0].y) == [1.5, 2.0, 2.3333, 2.5]


def test_a_long_prompt_stays_small():
    long = np.random.default_rng(0).random(20_000)
    figure = entropy_change(long, {"refine": long / 2}, ["x"] * 20_001)
    assert max(len(trace.y) for trace in figure.data) <= ttt_figures.POINTS
    assert len(figure.to_json()) < 300_000


def test_entropy_as_text():
    shown = EntropyText(TOKENS, BEFORE, AFTER, "refine")
    assert repr(shown) == (
        "REFINE: mean entropy 2.000 before, 1.750 after (-0.250 nats per token); more certain about 50% of 4 tokens.\n"
        "Largest decrease: “e” (-1.00), “·<b>” (-0.50).\nLargest increase: “d” (+0.50)."
    )
    page = shown._repr_html_()
    assert f"title='-0.500 nats' style='background: rgba({FALL}, 0.70)'> &lt;b&gt;</span>" in page
    assert f"title='+0.500 nats' style='background: rgba({RISE}, 0.70)'>d</span>" in page
    assert "<b>" not in page
    long = EntropyText(["x"] * 101, [1.0] * 100, [0.0] * 100, "sft", shown=10)._repr_html_()
    assert "… 91 tokens …" in long and long.count("<span") == 9


def test_steps_and_answers_of_one_prompt():
    step = {"loss_before": 2.0, "loss_after": 1.5, "entropy_before": 1.0, "entropy_after": 0.5}
    steps = pd.DataFrame(
        [
            {"method": w, "step": 1, **step, "reward": r, "tokens_per_second": 1234.5}
            for w, r in (("sft", math.nan), ("refine", 0.25))
        ]
    )
    table = ttt_figures.steps_table(steps).data
    assert table["reward"].tolist() == ["–", "0.250"] and table["tokens/s"].tolist() == ["1,234", "1,234"]
    said = {"references": ["a", "b"], "contains_answer": 1.0, "exact_match": math.nan, "f1": 0.5}
    rows = pd.DataFrame([{"method": "none", "answer": "<i>", **said}, {"method": "sft", "answer": "a\n", **said}])
    shown = ttt_figures.answers_table(rows)
    assert shown.data["method"].tolist() == ["baseline (no adaptation)", "SFT"]
    assert shown.data["answer"].tolist() == ["<i>", "a⏎"] and "&lt;i&gt;" in shown._repr_html_()
    assert shown.data["references"].tolist() == ["a | b"] * 2 and shown.data["exact-match rate"].tolist() == ["–", "–"]


def rests() -> dict[str, RestChange]:
    before = np.linspace(1, 3, 60)
    noise = np.random.default_rng(0).standard_normal(60) / 10
    return {
        "sft": rest_change(before, before - 0.5 + noise),
        "refine": rest_change(before, before + noise - noise.mean()),
    }


def test_the_held_out_rest_of_one_prompt():
    step = {"loss_before": 2.0, "loss_after": 1.5, "entropy_before": 1.0, "entropy_after": 0.5}
    rows = [{"method": m, "step": s, "rest_before": 2.5 - s / 10, "rest_after": 2.4 - s / 10, **step} for m, s in PAIRS]
    steps = pd.DataFrame(rows).assign(reward=0.25, tokens_per_second=10.0)
    shown = ttt_figures.steps_table(steps)
    assert shown.data["loss on the remainder after (nats)"].tolist() == pytest.approx([2.3, 2.2] * 2)
    assert shown.caption.endswith("means over the adapted part")
    figure = ttt_figures.rest_loss(steps)
    traces = {trace.name: trace for trace in figure.data}
    assert [*traces] == [f"{m}, {part}" for part in ("held-out remainder", "adapted part") for m in ("SFT", "REFINE")]
    assert list(traces["SFT, held-out remainder"].x) == [0, 1, 2]
    assert list(traces["SFT, held-out remainder"].y) == [2.4, 2.3, 2.2]
    assert traces["REFINE, held-out remainder"].line.width > traces["REFINE, adapted part"].line.width
    table = ttt_figures.rest_table(rests())
    assert table.data["method"].tolist() == ["SFT", "REFINE"]
    assert table.data["result"].tolist() == ["a gain beyond noise", "no gain beyond noise"]
    assert (table.data["95 % from"] < table.data["change"]).all() and (table.data["tokens"] == 60).all()
    check_figures(figure, table)


def test_many_steps_stay_small():
    steps = pd.DataFrame({"step": np.arange(1, 20_001), "method": "sft"})
    for name in ("rest_before", "rest_after", "loss_before", "loss_after"):
        steps[name] = np.random.default_rng(0).random(20_000)
    figure = ttt_figures.rest_loss(steps)
    assert max(len(trace.y) for trace in figure.data) <= ttt_figures.POINTS


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: entropy_change([], {"sft": []}, ["a"]), "figure entropy_change has no data"),
        (lambda: entropy_change([1.0], {"sft": [1.0, 2.0]}, ["a", "b"]), "expected 1 entropies for 2 tokens"),
        (lambda: EntropyText(["a"], [], [], "sft"), "figure EntropyText has no data"),
        (lambda: EntropyText(["a", "b"], [1.0], [1.0, 2.0], "sft"), "expected 1 entropies for 2 tokens"),
        (lambda: ttt_figures.steps_table(pd.DataFrame()), "figure steps_table has no data"),
        (lambda: ttt_figures.answers_table(pd.DataFrame()), "figure answers_table has no data"),
        (lambda: ttt_figures.rest_table({}), "figure rest_table has no data"),
        (lambda: ttt_figures.rest_loss(pd.DataFrame({"step": [1]})), "figure rest_loss has no data"),
    ],
)
def test_nothing_is_drawn_of_nothing(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw()
