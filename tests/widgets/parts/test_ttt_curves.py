"""The TTT panel's parts without a model: the curves of its steps, the result on the remainder, and the slider in percent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refine_lab.statistics.rest_change import rest_change, rest_difference
from refine_lab.ttt_config import TTTConfig
from widgets.parts.rest_result import RestResult
from widgets.parts.step_slider import StepSlider
from widgets.parts.ttt_curves import ttt_curves
from widgets.parts.ttt_results import Adaptation

STEPS = [
    {"step": 0, "loss": 3.0, "entropy": 2.0, "rest_loss": 3.5},
    {"step": 1, "loss": 2.5, "entropy": 1.5, "rest_loss": 3.25, "reward": 0.5},
]


def points(line: dict) -> list[tuple[float, float]]:
    return list(zip(*(np.frombuffer(line[axis], "<f4").tolist() for axis in "xy"), strict=True))


def adaptation(label: str, method: str, steps: list[dict[str, float]]) -> Adaptation:
    return Adaptation(label=label, method=method, config=TTTConfig(), steps=steps)


def test_the_methods_are_overlaid_with_the_rest_in_front() -> None:
    sft = [{name: row[name] for name in row if name != "reward"} for row in STEPS]
    found = ttt_curves([adaptation("SFT", "sft", sft), adaptation("REFINE", "refine", STEPS)])
    rest, loss, entropy, reward = found["panels"]
    for panel in (rest, loss, entropy):
        assert [line["method"] for line in panel["lines"]] == ["SFT", "REFINE"]
    assert [line["method"] for line in reward["lines"]] == ["REFINE"]
    assert [points(line) for line in rest["lines"]] == [[(0, 3.5), (1, 3.25)]] * 2
    assert points(loss["lines"][0]) == [(0, 3.0), (1, 2.5)] and points(reward["lines"][0]) == [(1, 0.5)]
    assert [line["front"] for line in (*rest["lines"], *loss["lines"])] == [True, True, False, False]
    looks = {each["method"]: (each["look"], each["symbol"], each["dash"]) for each in found["methods"]}
    assert looks == {"SFT": (1, "circle", "solid"), "REFINE": (2, "diamond", "solid")}
    assert (rest["title"], entropy["title"]) == ("Held-out NTP loss", "Entropy, adapted part")


def test_without_a_rest_there_is_one_loss() -> None:
    steps = [{name: row[name] for name in ("step", "loss", "entropy")} for row in STEPS]
    found = ttt_curves([adaptation("SFT", "sft", steps)])
    loss, entropy = found["panels"]
    assert (loss["title"], entropy["title"]) == ("NTP loss, prompt", "Entropy, prompt")
    assert found["methods"][0]["label"] == "SFT"


def test_many_steps_are_thinned() -> None:
    rows = [{"step": i, "loss": math.sin(i), "entropy": 1.0, "rest_loss": math.cos(i)} for i in range(20_000)]
    panels = ttt_curves([adaptation("SFT", "sft", rows)])["panels"]
    assert max(len(line["y"]) for panel in panels for line in panel["lines"]) <= 4 * 1000


def test_a_result_and_none() -> None:
    before = np.linspace(1, 3, 50)
    made, noise = RestResult(), np.random.default_rng(0).standard_normal(50) / 10
    change = rest_change(before, before - 0.5 + noise)
    made.show({"SFT": change}, methods={"SFT": "sft"})
    (result,) = made.results
    assert result["interval"] == [change.interval[0], change.change.value, change.interval[1]]
    assert repr(made).casefold() == change.sentence.casefold() and result["verdict"] == "a gain beyond noise"
    made.show({"SFT": rest_change(before, before)})
    assert (made.results[0]["interval"], made.results[0]["verdict"]) == ([], "no gain beyond noise")
    made.show({})
    assert (made.results, repr(made)) == ([], "no result")


def test_the_difference_of_two_methods_comes_first() -> None:
    before = np.linspace(1, 3, 50)
    noise = np.random.default_rng(0).standard_normal((2, 50)) / 10
    sft, refine = before - 0.1 + noise[0], before - 0.5 + noise[1]
    changes = {"SFT": rest_change(before, sft), "REFINE": rest_change(before, refine)}
    made = RestResult()
    made.show(changes, [rest_difference("SFT", sft, "REFINE", refine)], {"SFT": "sft", "REFINE": "refine"})
    shown = [(each["name"], each["pair"], each["look"]) for each in made.results]
    assert shown == [("REFINE − SFT", True, -1), ("SFT", False, 1), ("REFINE", False, 2)]
    assert made.results[0]["interval"][1] == pytest.approx(float(np.mean(refine - sft)))
    assert repr(made).startswith("REFINE − SFT. REFINE is better beyond noise: ")


def test_a_slider_with_a_unit() -> None:
    assert (
        repr(StepSlider(label="Held-out remainder", last=90, value=33, unit="%"))
        == "StepSlider: Held-out remainder 33 %"
    )
