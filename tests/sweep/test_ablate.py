"""Ablations as grids: which cells there are, and which runs belong to which setting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refine_lab.config import TrainConfig
from refine_lab.recipes.ablations import ABLATIONS, ablations
from refine_lab.runs.writer import RunWriter
from refine_lab.sweep.ablate import Scale, cells_with, changes, midtrain_grids, reward_curves, trained_models, ttt_grids
from refine_lab.sweep.cells import Cell
from refine_lab.sweep.configs import cell_configs
from refine_lab.sweep.runner import plan
from refine_lab.validation import ConfigError

SCALE = Scale(seeds=[0, 3], midtrain={"steps": 4, "lr": None, "sequence_length": 512}, ttt={"count": 2, "model": None})


def test_the_values_are_the_papers():
    k, c = ABLATIONS["k"].settings, ABLATIONS["c"].settings
    assert [setting["rollout_length"] for setting in k.values()] == [1, 3, 5, 7, 9]
    assert [setting["num_chunks"] for setting in c.values()] == [1, 2, 4, 8, 16]
    assert list(ABLATIONS["selection"].settings) == ["uniform", "argmax", "argmin", "entropy"]
    assert list(ablations("k, reward,k")) == ["k", "reward"]


def test_the_recipes_setting_is_trained_once_and_alone_has_an_sft_run(tmp_path):
    chosen = ablations("reward,k,group_by,entropy_index,ttt_reward")
    cells = plan("midtrain", midtrain_grids(chosen, SCALE), tmp_path).cells
    assert len(cells) == 2 * (1 + 1 + 4 + 2 + 1)  # seeds * (recipe, binary, four k, two groups, equation)
    methods = [[config.method for config in cell_configs(cell)] for cell in cells]
    assert methods == [["sft", "refine"]] * 2 + [["refine"]] * 16
    for cell in cells:
        refine = cell_configs(cell)[-1].refine
        assert refine.smoothing_kernel == refine.rollout_length and cell_configs(cell)[-1].steps == 4
        assert len(cell.values["seeds"]) == 1
    assert changes(chosen["reward"], SCALE) == {"binary": {"reward": "binary", "sft": False}, "cosine": {"sft": True}}


def test_every_setting_finds_its_own_cells_and_no_other(tmp_path):
    chosen = ablations("reward,k,n,group_by")
    planned = plan("midtrain", midtrain_grids(chosen, SCALE), tmp_path)
    for ablation in chosen.values():
        for label, setting in changes(ablation, SCALE).items():
            cells = cells_with(planned, {"steps": 4, "sequence_length": 512, **setting})
            assert [cell.values["seeds"] for cell in cells] == [[0], [3]], label
            refines = [cell_configs(cell)[-1].refine for cell in cells]
            wanted = ablation.settings[label]
            assert all({name: getattr(refine, name) for name in wanted} == wanted for refine in refines)


def test_test_time_training_starts_from_the_run_of_the_recipes_setting(tmp_path):
    chosen = ablations("ttt_reward")
    planned = plan("midtrain", midtrain_grids(chosen, SCALE), tmp_path)
    assert trained_models(planned) == {} and set(trained_models(planned, or_initial=True).values()) == {"tiny-deltanet"}
    run = _finished(planned.cells[1])
    assert trained_models(planned) == {3: str(run)}
    models = trained_models(planned, or_initial=True)
    assert models == {0: "tiny-deltanet", 3: str(run)}
    grids = ttt_grids(chosen, SCALE, models)
    assert [(grid["reward"], grid["seeds"], grid["model"]) for grid in grids] == [
        (reward, [seed], models[seed]) for reward in ("cosine", "binary") for seed in (0, 3)
    ]
    assert reward_curves(ablations("k"), SCALE, planned).empty


def _finished(cell: Cell):
    """Writes the run of REFINE that a cell would make, without training."""
    config: TrainConfig = replace(cell_configs(cell)[-1], steps=0)
    with RunWriter.create(config, cell.output) as writer:
        writer.status("finished", 0)
    return writer.path


@pytest.mark.parametrize("names", ["", "k,,c"])
def test_no_name_is_not_an_ablation(names):
    with pytest.raises(ConfigError) as refusal:
        ablations(names)
    assert (refusal.value.field, refusal.value.value) == ("ablation", "")
