"""The configurations of an experiment with any of the methods."""

from __future__ import annotations

import pytest

from refine_lab.experiments.compare import ORDER
from refine_lab.experiments.configs import method_configs
from refine_lab.recipes.methods import KNOWN
from tests.support.refusals import refused
from widgets.figures.series import COLOURS, KNOWN_METHODS, looks_like, method_styles

ALL = {
    "midtrain": ("midtrain", [*KNOWN["midtrain"]]),
    "posttrain": ("posttrain", [*KNOWN["posttrain"]]),
    "ttt": ("per_prompt", [*KNOWN["ttt"]]),
}


@pytest.mark.parametrize("phase", ALL)
def test_all_methods_of_a_phase_are_made_by_their_names(phase):
    recipe, methods = ALL[phase]
    several = {"mini_batch_size": 4} if phase == "midtrain" else {}  # with one update a batch the release omits none
    configs = method_configs(recipe, [3], phase=phase, methods=methods, **several)
    assert [config.method for config in configs] == sorted(methods, key=lambda name: name != "none")


def test_methods_differ_as_their_recipes_say_and_a_setting_reaches_those_it_applies_to():
    methods = ["sft", "weighted", "expected", "dft", "refine", "placebo", "sft_compute"]
    configs = method_configs("midtrain", [0], methods=methods, reward="edit", nsp_coef=0.4, steps=40)
    found = {config.method: config for config in configs}
    assert {name: config.steps for name, config in found.items()} == dict.fromkeys(methods, 40) | {"sft_compute": 50}
    assert found["sft"].refine is found["sft_compute"].refine is None
    rewards = {name: config.refine.reward for name, config in found.items() if config.refine}
    assert rewards == {"weighted": "cosine", "expected": "exact", "dft": "cosine", "refine": "edit", "placebo": "edit"}
    weights = {
        name: (config.refine.ntp_coef, config.refine.nsp_coef) for name, config in found.items() if config.refine
    }
    assert weights == dict.fromkeys(("weighted", "expected", "refine", "placebo"), (1, 0.4)) | {"dft": (0, 1)}


def test_a_custom_reward_is_that_of_the_methods_with_rollouts():
    def first(inputs):
        return (inputs.rollout_ids[:, 0] == inputs.target_ids[:, 0]).float()

    configs = method_configs("midtrain", [0], methods=["refine", "expected"], reward=first)
    assert [config.refine.reward for config in configs] == ["custom", "exact"]


def test_the_baseline_comes_first_and_no_method_twice():
    configs = method_configs("per_prompt", [0], methods=["expected", "none"])
    assert [config.method for config in configs] == ["none", "expected"]
    same = (
        ("midtrain", ["sft", "sft"], "equal"),
        ("posttrain", ["refine", "nested_refine"], "equal"),
        ("midtrain", ["sft", "sft_compute"], "compute"),
    )
    for recipe, methods, updates in same:
        with refused("methods", methods):
            method_configs(recipe, [0], methods=methods, updates=updates)
    with refused("method", "expectd"):
        method_configs("midtrain", [0], methods=["expectd"])


@pytest.mark.parametrize(
    ("methods", "name", "value"),
    [
        (["expected"], "reward", "cosine"),
        (["sft", "expected", "weighted"], "group_size", 4),
        (["dft", "longce"], "nsp_coef", 0.3),
        (["dft"], "num_chunks", 4),
    ],
)
def test_a_setting_that_no_method_uses_is_refused(methods, name, value):
    with refused(name, value, "none for these methods"):
        method_configs("midtrain", [0], methods=methods, **{name: value})
    assert len(method_configs("midtrain", [0], methods=["refine", *methods], **{name: value})) == len(methods) + 1
    assert method_configs("midtrain", [0], methods=["sft"], **{name: value})


def test_methods_that_become_the_same_and_no_methods_are_refused():
    same = {"selection": "memory", "group_size": 8, "group_by": "prefix", "reward": "binary", "nsp_coef": 1.0}
    with refused("methods", ["refine", "refine_memory"]):
        method_configs("midtrain", [0], methods=["refine", "refine_memory"], **same)
    with refused("methods", []):
        method_configs("midtrain", [0], methods=[])


def test_one_rollout_from_each_position_is_compared_with_those_of_the_others():
    methods = ["refine", "refine_memory"]
    configs = method_configs("midtrain", [0], methods=methods, group_size=1)
    assert [config.refine.group_by for config in configs] == ["sequence", "sequence"]
    with refused("RefineConfig.group_size", 1):
        method_configs("midtrain", [0], methods=methods, group_size=1, group_by="prefix")


def test_a_value_that_the_methods_have_anyway_is_accepted():
    assert method_configs("midtrain", [0], methods=["dft"], nsp_coef=1.0, group_size=1)


def test_every_method_has_a_label_and_a_style_of_its_own():
    styles = method_styles(name for name in ORDER if name != "none")
    labels = [style.label for style in styles.values()]
    assert len(set(labels)) == len(labels)
    assert all(looks_like(name) in KNOWN_METHODS for name in ORDER)
    assert {style.colour for style in styles.values()} <= set(COLOURS)
    looks = [(style.colour, style.symbol) for style in KNOWN_METHODS.values()]
    assert len(set(looks)) == len(looks)
    assert (styles["nested_expected"].label, styles["sft_compute"].label) == (
        "nested expected match",
        "SFT, equal compute",
    )
