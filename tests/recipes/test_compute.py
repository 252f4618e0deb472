"""SFT with as much compute as REFINE."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from refine_lab.recipes import (
    compute_updates,
    midtrain,
    paper_midtrain,
    posttrain,
    posttrain_searched,
    ttt_paper,
    ttt_per_prompt,
)
from refine_lab.recipes.compute import STEP_COST, STEP_COST_PLANNED
from tests.support.paths import ROOT
from tests.support.refusals import refused


def test_the_ratios_are_those_that_were_measured():
    figures = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())
    measured = {name: figures[name]["refine_over_sft"] for name in ("1024", "four_updates")}
    assert measured == pytest.approx({"1024": STEP_COST, "four_updates": STEP_COST_PLANNED}, rel=0.05)


def test_sft_makes_more_steps_and_every_other_method_as_many():
    assert compute_updates(midtrain("sft")).steps == round(20 * 1.25) == 25
    assert compute_updates(paper_midtrain("sft")).steps == 160, "four updates a batch cost 1.6 times as much"
    for method in ("refine", "expected", "dft"):
        made = compute_updates(midtrain(method))
        assert (made.steps, made.method, made.updates) == (20, method, "compute")


def test_in_post_training_the_update_on_the_answers_counts_as_much_as_a_pass_over_the_prompts():
    nested = compute_updates(posttrain("nested_sft"))
    assert (nested.steps, nested.method) == (round(25 * 1.3), "nested_sft_compute")
    assert compute_updates(posttrain_searched("nested_sft")).steps == round(25 * 1.125)
    assert compute_updates(posttrain("sft")).method == "sft", (
        "without updates on the prompts there is nothing to compare"
    )


def test_at_test_time_it_makes_more_updates_on_a_prompt():
    made = compute_updates(ttt_per_prompt("sft"))
    assert made.ttt is not None
    assert (made.ttt.steps, made.method) == (5, "sft_compute")
    paper = compute_updates(ttt_paper("sft"))
    assert paper.ttt is not None and paper.ttt.steps == 2
    assert compute_updates(ttt_per_prompt("none")).method == "none"


def test_too_few_steps_are_refused():
    config = ttt_per_prompt("sft")
    assert config.ttt is not None
    one = replace(config, ttt=replace(config.ttt, steps=1))
    with refused("steps", 1, "such that 1.25 times as many are at least one more"):
        compute_updates(one)
