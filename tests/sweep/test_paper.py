"""The settings of the paper's ablations: trained as a sweep, evaluated, found as rows of the tables, and not repeated."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation.results import read_json
from refine_lab.experiments.paper_rows import Row, measured, paper_runs
from refine_lab.experiments.paper_runs import PaperPlan, plan_of
from refine_lab.sweep.paper import SWEEP, ablation_cells, ablation_grids, launch_ablations
from tests.support.refusals import refused

SMALL = {"steps": 1, "batch_size": 2, "sequence_length": 256}
PLAN = PaperPlan(
    chain=(3,),
    seeds=(0,),
    ablations=("reward",),
    tasks=("recall", "niah"),
    lengths=(256,),
    samples=2,
    device="cpu",
    **SMALL,
)


def test_the_grids_have_every_setting_but_the_recipes():
    plan = plan_of(tasks="recall", ablations="reward, selection,k,c", seeds=[0, 1], sequence_length=1024)
    changed = [{name: grid[name] for name in grid if name not in SMALL} for grid in ablation_grids(plan)]
    settings = [
        {name: grid[name] for name in grid if name not in ("recipe", "model", "device", "methods")} for grid in changed
    ]
    assert len(settings) == 1 + 3 + 4 + 4 and all(each.pop("sft") is False for each in settings)
    assert all(each.pop("seeds") == [0, 1] for each in settings)
    assert settings[0] == {"reward": "binary"} and {"rollout_length": 5} not in settings
    assert ablation_grids(replace(plan, ablations=())) == []


def test_a_plan_without_another_setting_has_no_cells(tmp_path):
    with refused("ablations", ()):
        ablation_cells(replace(PLAN, ablations=()), tmp_path)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.notebook
def test_the_settings_are_trained_evaluated_and_found(tmp_path):
    lines: list[str] = []
    (planned,) = ablation_cells(PLAN, tmp_path).cells
    assert planned.state == "waiting" and planned.folder.parent == tmp_path / SWEEP
    result = launch_ablations(PLAN, tmp_path, lines.append)
    (cell,) = result.cells
    (run,) = result.runs
    assert cell.folder == planned.folder and cell.state == run.state == "finished"
    assert run.config.refine.reward == "binary" and run.config.steps == 1 and run.config.batch_size == 2
    binary = Row("refine", setting="reward=binary")
    assert {path: row for path, (_, row) in paper_runs(tmp_path, PLAN.model, **SMALL).items()} == {run.path: binary}
    out = tmp_path / "evaluations" / "refine-reward_binary-s0"
    written = read_json(out / "results.json")
    assert [(unit["task"], unit["length"], unit["status"]) for unit in written["units"]] == [("recall", 256, "done")]
    frame, _ = measured(tmp_path, PLAN.model, samples=2, **SMALL)
    recalled = frame[(frame["task"] == "recall") & (frame["metric"] == "exact_recall_word-4")]
    assert recalled[[*Row._fields, "seed"]].to_numpy().tolist() == [[*binary, 0]]
    assert recalled["value"].item() == written["units"][0]["metrics"]["exact_recall_word-4"]["value"]
    (scores,) = recalled["scores"]
    assert scores["item"].nunique() == 2 and scores["score"].mean() == pytest.approx(recalled["value"].item())
    files = (cell.executed, cell.folder / "log.txt", run.path / "metrics.jsonl", out / "units" / "recall-256.json")
    before = [path.stat().st_mtime_ns for path in files]
    again = launch_ablations(PLAN, tmp_path, lines.append)
    assert [each.folder for each in again.cells] == [cell.folder]
    assert [path.stat().st_mtime_ns for path in files] == before, "nothing is executed or measured again"
