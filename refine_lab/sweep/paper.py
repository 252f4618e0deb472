"""Trains models with the settings of the paper's ablations, as a sweep of the mid-training notebook, and evaluates them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from refine_lab.evaluation.catalogue import chosen
from refine_lab.evaluation.run import evaluate
from refine_lab.experiments.paper_rows import run_of_setting
from refine_lab.experiments.paper_runs import EVALUATIONS, PaperPlan, evaluation_of
from refine_lab.recipes.ablations import ablations
from refine_lab.sweep.ablate import Scale, midtrain_grids
from refine_lab.sweep.grid import Grid
from refine_lab.sweep.runner import Sweep, plan, sweep
from refine_lab.validation import require

SWEEP = "sweep"
"""Folder of the sweep, beside the runs."""


def ablation_grids(paper: PaperPlan) -> list[Grid]:
    """Returns a grid for each setting of the plan's ablations at the plan's scale, without the recipe's own setting.

    The chain of table 4 trains the recipe's setting.
    """
    names = ("model", "steps", "batch_size", "sequence_length", "device")
    sizes = {name: getattr(paper, name) for name in names}
    scale = Scale(seeds=paper.seeds, midtrain={"recipe": paper.midtrain_recipe, **sizes}, ttt={})
    grids = midtrain_grids(ablations(",".join(paper.ablations)), scale) if paper.ablations else []
    return [grid for grid in grids if grid.get("sft") is False]


def ablation_cells(paper: PaperPlan, folder: Path) -> Sweep:
    """Returns the cells of the plan's ablations, finished or not; nothing is executed. Raises as `launch_ablations`."""
    grids = ablation_grids(paper)
    require(len(grids) > 0, "ablations", paper.ablations, "one or more with a setting other than the recipe's")
    return plan("midtrain", grids, folder / SWEEP)


def launch_ablations(paper: PaperPlan, folder: Path, report: Callable[[str], object] = print) -> Sweep:
    """Trains every setting of the plan's ablations at the plan's scale, and evaluates the models.

    Only what `folder` lacks is executed. They are evaluated by the plan's tasks that the ablations' tables have: `recall`
    and LongBench. Raises ConfigError for a plan without ablations, and RuntimeError if a setting failed.
    """
    planned = ablation_cells(paper, folder)
    result = sweep("midtrain", ablation_grids(paper), planned.out, log=report)
    result.require_finished()
    tasks = tuple(task for task in chosen(paper.tasks) if task == "recall" or task.startswith("longbench_"))
    for run in result.runs if tasks else ():
        out = folder / EVALUATIONS / f"{run_of_setting(run)}-s{run.config.seed}"
        report(f"\n{out.name}:")
        evaluate(evaluation_of(paper, str(run.path), tasks), out, report)
    return result
