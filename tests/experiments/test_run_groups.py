"""Which runs are averaged: those of one experiment, which differ in the seed alone."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from refine_lab.config import DataConfig, RefineConfig, TrainConfig
from refine_lab.experiments.compare import metrics
from refine_lab.experiments.run_groups import flat_settings, group_names
from refine_lab.recipes import ttt_per_prompt
from refine_lab.runs.writer import RunWriter

BASE = TrainConfig(recipe="tiny", steps=4, batch_size=2, mini_batch_size=2)


def arms_of(*configs: TrainConfig) -> list[str]:
    return group_names([(config.method, config, f"2026112{i}-100000-tiny-x") for i, config in enumerate(configs)])


def test_seeds_of_one_experiment_have_its_arm() -> None:
    sft = replace(BASE, refine=None)
    assert arms_of(BASE, replace(BASE, seed=1), sft, replace(sft, seed=1)) == ["refine", "refine", "sft", "sft"]
    tested = [ttt_per_prompt("refine", seed) for seed in (0, 1)]
    assert tested[0].ttt is not None and tested[1].ttt is not None and tested[0].ttt.seed != tested[1].ttt.seed
    assert group_names([(config.method, config, "r") for config in tested]) == ["refine", "refine"]
    assert arms_of() == []


def test_other_settings_are_another_arm_that_says_what_differs() -> None:
    assert BASE.refine is not None
    longer = replace(BASE, steps=8, lr=1e-3)
    assert arms_of(BASE, longer, replace(longer, seed=1)) == [
        "refine: lr 1e-06, steps 4",
        "refine: lr 0.001, steps 8",
        "refine: lr 0.001, steps 8",
    ]
    binary = replace(BASE, refine=replace(BASE.refine, reward="binary"))
    assert arms_of(BASE, binary) == ["refine: reward cosine", "refine: reward binary"]
    assert arms_of(replace(BASE, model="/data/one"), BASE)[0] == "refine: model one"
    prose = replace(BASE, data=DataConfig(sources={"/data/prose.txt": 1.0}))
    assert arms_of(BASE, prose) == ["refine: python 1.0, prose.txt –", "refine: python –, prose.txt 1.0"]


def test_a_repeat_of_a_run_and_differences_past_the_named_ones_are_told_by_their_date() -> None:
    assert arms_of(BASE, replace(BASE, seed=1), BASE) == [
        "refine: 20261120-100000",
        "refine: 20261120-100000",
        "refine: 20261122-100000",
    ]
    many = replace(BASE, recipe="other", model="tiny-lact", lr=0.5)
    both = arms_of(BASE, many, replace(many, weight_decay=0.5))
    assert len(set(both)) == 3
    assert both[1].endswith("20261121-100000") and both[2].endswith("20261122-100000")


def test_every_setting_has_its_dotted_name() -> None:
    settings = flat_settings(replace(BASE, refine=RefineConfig(reward="hybrid")))
    assert (settings["steps"], settings["refine.reward"], settings["data.sources.python"]) == ("4", '"hybrid"', "1.0")


def test_metrics_of_two_experiments_are_not_one(tmp_path) -> None:
    runs = []
    for steps in (2, 3):
        with RunWriter.create(replace(BASE, steps=steps), tmp_path) as writer:
            for step in range(1, steps + 1):
                writer.train(step, {"ntp_loss": float(steps)})
            writer.flush()
            runs.append(writer.run)
    found = metrics(runs)
    means = found.groupby("method")["ntp_loss"].mean()
    pd.testing.assert_series_equal(
        means, pd.Series({"refine: steps 2": 2.0, "refine: steps 3": 3.0}), check_names=False
    )
    assert metrics(runs[:1])["method"].tolist() == ["refine"] * 2


@pytest.mark.parametrize("count", [2, 7])
def test_any_number_of_experiments_has_names_of_their_own(count: int) -> None:
    assert len(set(arms_of(*(replace(BASE, lr=10.0**-i) for i in range(1, count + 1))))) == count
