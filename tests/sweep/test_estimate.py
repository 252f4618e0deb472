"""The estimate of time and disk space, by hand and with real timings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.estimate import Rates, training_rates
from refine_lab.runs.files import write_json
from refine_lab.sweep.estimate import CELL_BYTES, PARAMETER_BYTES, ROLLOUT_BYTES, Estimate, run_bytes
from refine_lab.sweep.runner import plan
from tests.factories.swept import write_notebook


def test_the_size_of_a_run_is_its_checkpoints_and_rollouts():
    sft, refine = method_configs("midtrain", [0], steps=100, checkpoint_every=10, batch_size=2)
    checkpoint = 1_000 * PARAMETER_BYTES
    assert run_bytes(sft, 1_000) == 4 * checkpoint  # three newest and the one of lowest loss
    assert run_bytes(refine, 1_000) == 4 * checkpoint + 100 * 2 * 8 * ROLLOUT_BYTES
    assert run_bytes(replace(sft, checkpoint_every=100), 1_000) == checkpoint
    assert run_bytes(replace(sft, keep_every=20), 1_000) == 9 * checkpoint
    assert CELL_BYTES > 0 and run_bytes(method_configs("per_prompt", [0])[-1], 1_000) == 0


def test_the_time_of_a_run_grows_with_its_batches_and_evaluations():
    config = method_configs("midtrain", [0], steps=100, eval_every=30, batch_size=4)[0]
    assert Rates(row=0.5, evaluation=2.0, parameters=1).seconds(config) == 0.5 * 100 * 4 + 2.0 * (1 + 4)


def test_training_is_timed_on_the_model_itself():
    _, refine = method_configs("midtrain", [0], sequence_length=256, batch_size=2, num_chunks=2)
    rates = training_rates(refine)
    assert rates.row > 0 and rates.evaluation > 0 and 1_000_000 < rates.parameters < 1_200_000


def test_a_notebook_without_a_recipe_is_estimated_by_its_finished_cells(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb")
    planned = plan(notebook, {"count": [1, 2, 3]}, tmp_path / "out")
    lines: list[str] = []
    assert planned.estimate(lines.append) == Estimate(seconds=None, bytes=None, cells=3) and len(lines) == 1
    planned.cells[0].folder.mkdir(parents=True)
    write_json(planned.cells[0].folder / "result.json", {"state": "finished", "seconds": 90.0})
    estimate = planned.estimate(lines.append)
    assert estimate == Estimate(seconds=180.0, bytes=None, cells=2)
    assert estimate.sentence(2).startswith("2 cells to execute: about 90 s with 2 at a time")
    assert estimate.sentence(8) == estimate.sentence(2), "two cells occupy two processes"
    assert replace(estimate, cells=1).sentence(8).startswith("1 cell to execute: about 3 min, ")


@pytest.mark.parametrize(("seconds", "text"), [(119.0, "119 s"), (120.0, "2 min"), (7199.0, "120 min"), (9e3, "2.5 h")])
def test_durations_have_readable_units(seconds, text):
    assert f"about {text}, about 3 MB on disk" in Estimate(seconds=seconds, bytes=3_000_000, cells=1).sentence()
