"""All methods of a phase: their names, and what each changes in a recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refine_lab.config import RefineConfig, from_json, to_json
from refine_lab.recipes import METHODS, named, recipe
from refine_lab.recipes.methods import (
    CHANGES,
    KNOWN,
    ORDER,
    applicable,
    changes_of,
    compared,
    known_method,
    split_updates,
)
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import ConfigError
from tests.support.refusals import refused

MADE = [
    (phase, name, method)
    for phase in METHODS
    for name in named(phase)
    for method in KNOWN[phase]
    if split_updates(method)[1] is None
]


def refine_of_config(config) -> RefineConfig | None:
    return (config.ttt and config.ttt.refine) if isinstance(config, TTTRunConfig) else config.refine


@pytest.mark.parametrize(("phase", "name", "method"), MADE)
def test_every_recipe_makes_every_method_which_comes_back_from_its_json(phase, name, method):
    config = recipe(name).make(method, seed=7)
    assert config.method == method and from_json(to_json(config), kind=type(config)) == config
    refine, changes = refine_of_config(config), changes_of(method)
    assert (refine is None) == (changes is None)
    for field, value in (changes or {}).items():
        assert getattr(refine, field) == value


@pytest.mark.parametrize("phase", METHODS)
def test_the_methods_of_the_paper_are_among_those_of_the_phase_and_all_have_a_place_in_the_order(phase):
    assert set(METHODS[phase]) <= set(KNOWN[phase]) <= set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_losses_that_replace_the_next_token_loss_stand_alone():
    losses = {
        name: (RefineConfig(**changes).ntp_coef, RefineConfig(**changes).nsp_coef) for name, changes in CHANGES.items()
    }
    assert losses["dft"] == losses["longce"] == (0, 1)
    assert losses["weighted"] == losses["expected"] == (1, 1)
    assert losses["refine"] == losses["placebo"] == (1, 0.2)


def test_a_method_of_post_training_may_be_named_without_its_prefix():
    found = {name: known_method(name, "posttrain") for name in ("sft", "expected", "nested_expected", "sft_compute")}
    assert found == {
        "sft": "sft",
        "expected": "nested_expected",
        "nested_expected": "nested_expected",
        "sft_compute": "nested_sft_compute",
    }
    assert known_method("expected", "midtrain") == "expected"


@pytest.mark.parametrize(
    ("name", "phase"),
    [("rl", "midtrain"), ("nested_refine", "midtrain"), ("none", "posttrain"), ("refine_release", "ttt")],
)
def test_an_unknown_method_is_refused(name, phase):
    with refused("method", name, ", ".join(KNOWN[phase])):
        known_method(name, phase)


def test_a_recipe_makes_no_other_number_of_updates():
    with refused("method", "sft_compute", "'sft', whose updates are set afterwards"):
        recipe("midtrain").make("sft_compute", 0)
    assert split_updates("nested_sft_release") == ("nested_sft", "release")
    assert split_updates("nested_sft") == ("nested_sft", None)


def test_a_setting_reaches_the_methods_that_it_applies_to():
    made = {name: RefineConfig(**changes) for name, changes in CHANGES.items()}
    given = {"reward": "binary", "nsp_coef": 0.3, "lr": 1e-4}
    left = {name: {*given} - {*applicable(refine, given)} for name, refine in made.items()}
    without = {"reward", "nsp_coef"}
    assert left == {
        "refine": set(),
        "refine_memory": set(),
        "placebo": set(),
        "expected": set(),
        "weighted": {"reward"},
        "longce": without,
        "dft": without,
    }
    assert "reward" not in applicable(made["expected"], {"reward": "cosine"})
    assert applicable(None, given) == given


def test_another_selection_has_the_temperature_and_margin_of_refine():
    made = {name: RefineConfig(**changes) for name, changes in CHANGES.items()}
    found = applicable(made["expected"], {"selection": "uniform", "margin": 7})
    assert found == {"selection": "uniform", "tau": 1.0, "margin": 7}
    assert applicable(made["refine_memory"], {"selection": "entropy"}) == {
        "selection": "entropy",
        "tau": 1,
        "margin": 20,
    }
    assert applicable(made["refine"], {"selection": "uniform"}) == {"selection": "uniform"}


def test_refine_by_memory_compares_eight_rollouts_from_each_position():
    refine = RefineConfig(**CHANGES["refine_memory"])
    assert (refine.method, refine.selection, refine.group_size, refine.group_by) == (
        "refine_memory",
        "memory",
        8,
        "prefix",
    )
    assert replace(refine, selection="copy").method == "refine" and replace(refine, placebo=True).method == "placebo"


def test_the_laptop_recipe_compares_four_methods_and_the_papers_its_own_two():
    assert compared("midtrain", "midtrain") == ["sft", "refine", "refine_memory", "expected"]
    assert compared("paper_midtrain", "midtrain") == ["sft", "refine"]
    assert compared("midtrain", "midtrain", sft=False) == ["refine", "refine_memory", "expected"]
    assert compared("midtrain", "midtrain", ["dft", "sft"]) == ["dft", "sft"]
    with refused("methods", ["sft"]):
        compared("midtrain", "midtrain", ["sft"], sft=False)


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(ConfigError, check=lambda error: "'expected'?" in str(error)):
        known_method("expectd", "midtrain")
