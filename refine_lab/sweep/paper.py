"""Trains the settings that the paper ablates, as a sweep of the mid-training notebook, and evaluates the models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from refine_lab.evaluation.catalogue import chosen
from refine_lab.evaluation.run import evaluate
from refine_lab.experiments.paper_rows import run_of_setting
from refine_lab.experiments.paper_runs import EVALUATIONS, PaperPlan, evaluation_of
from refine_lab.recipes.ablations import ablations
from refine_lab.sweep.ablate import Scale, midtrain_grids
from refine_lab.sweep.runner import Sweep, sweep

SWEEP = "sweep"
"""Folder of the sweep, beside the runs."""


def launch_ablations(plan: PaperPlan, folder: Path, names: str, report: Callable[[str], object] = print) -> Sweep:
    """Trains every setting of the ablations in `names`, with commas, at the plan's scale, and evaluates the models.

    Only what `folder` lacks is executed. They are evaluated by the plan's tasks that the ablations' tables have: `recall`
    and LongBench. Raises ConfigError for an unknown ablation, and RuntimeError if a setting failed.
    """
    sizes = {name: getattr(plan, name) for name in ("model", "steps", "batch_size", "sequence_length", "device")}
    scale = Scale(seeds=plan.seeds, midtrain={"recipe": plan.midtrain_recipe, **sizes}, ttt={})
    grids = [grid for grid in midtrain_grids(ablations(names), scale) if grid.get("sft") is False]
    result = sweep("midtrain", grids, folder / SWEEP, log=report)
    result.require_finished()
    tasks = tuple(task for task in chosen(plan.tasks) if task == "recall" or task.startswith("longbench_"))
    for run in result.runs if tasks else ():
        out = folder / EVALUATIONS / f"{run_of_setting(run)}-s{run.config.seed}"
        report(f"\n{out.name}:")
        evaluate(evaluation_of(plan, str(run.path), tasks), out, report)
    return result
