"""The TTT panel's parts without a model: the curves of its steps, the result on the remainder, and the slider in percent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refine_lab.statistics.rest_change import rest_change
from widgets.parts.rest_result import RestResult
from widgets.parts.step_slider import StepSlider
from widgets.parts.ttt_curves import ttt_curves

STEPS = [
    {"step": 0, "loss": 3.0, "entropy": 2.0, "rest_loss": 3.5},
    {"step": 1, "loss": 2.5, "entropy": 1.5, "rest_loss": 3.25, "reward": 0.5},
]


def points(line: dict) -> list[tuple[float, float]]:
    return list(zip(*(np.frombuffer(line[axis], "<f4").tolist() for axis in "xy"), strict=True))


@pytest.mark.parametrize(("method", "colour"), [("refine", 2), ("sft", 1)])
def test_the_rest_is_in_front_of_the_adapted_part(method: str, colour: int) -> None:
    found = ttt_curves(STEPS, method)
    loss, entropy, reward = found["panels"]
    assert [points(line) for line in loss["lines"]] == [[(0, 3.5), (1, 3.25)], [(0, 3.0), (1, 2.5)]]
    assert [line["front"] for line in loss["lines"]] == [True, False]
    assert points(entropy["lines"][0]) == [(0, 2.0), (1, 1.5)] and points(reward["lines"][0]) == [(1, 0.5)]
    looks = {each["method"]: each for each in found["methods"]}
    assert {name: (look["look"], look["dash"]) for name, look in looks.items()} == {
        "rest_loss": (colour, "solid"), "loss": (0, "dash"), "entropy": (colour, "solid"), "reward": (colour, "solid")
    }  # fmt: skip
    assert (looks["rest_loss"]["label"], looks["loss"]["label"]) == ("held-out remainder", "adapted part")
    assert entropy["title"] == "Entropy, adapted part"


def test_without_a_rest_there_is_one_loss() -> None:
    found = ttt_curves([{name: row[name] for name in ("step", "loss", "entropy")} for row in STEPS], "sft")
    loss, entropy = found["panels"]
    assert (loss["title"], entropy["title"]) == ("NTP loss of the prompt", "Entropy of the prompt")
    assert [line["method"] for line in loss["lines"]] == ["loss"]
    assert found["methods"][0]["label"] == "SFT"


def test_many_steps_are_thinned() -> None:
    rows = [{"step": i, "loss": math.sin(i), "entropy": 1.0, "rest_loss": math.cos(i)} for i in range(20_000)]
    panels = ttt_curves(rows, "sft")["panels"]
    assert max(len(line["y"]) for panel in panels for line in panel["lines"]) <= 4 * 1000


def test_a_result_and_none() -> None:
    before = np.linspace(1, 3, 50)
    made, noise = RestResult(), np.random.default_rng(0).standard_normal(50) / 10
    change = rest_change(before, before - 0.5 + noise)
    made.show(change)
    assert made.interval == [change.interval[0], change.change.value, change.interval[1]]
    assert repr(made).casefold() == change.sentence.casefold() and made.verdict == "a gain beyond noise"
    made.show(rest_change(before, before))
    assert made.interval == [] and made.verdict == "no gain beyond noise"
    made.show(None)
    assert (made.verdict, made.details, made.interval, repr(made)) == ("", "", [], "no result")


def test_a_slider_with_a_unit() -> None:
    assert (
        repr(StepSlider(label="Held-out remainder", last=90, value=33, unit="%"))
        == "StepSlider: Held-out remainder 33 %"
    )
