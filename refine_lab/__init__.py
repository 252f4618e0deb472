"""refine_lab: a research workbench for REFINE, "Reinforced Fast Weights with Next-Sequence Prediction" (arXiv 2602.16704).

`method` holds the paper's procedure, one step per file. `models` and `ops` represent fast weights as values, `data`
prepares text and tasks, `recipes` has the paper's hyperparameters, `training` runs the method in every phase, `runs` reads and
writes run directories, `evaluation` evaluates models on benchmarks, `statistics` compares methods, and `experiments`,
`sweep` and `explore` are what notebooks and widgets call. docs/architecture.md lists the folders in the order of their
imports.

The names below are imported on first use, so that `import refine_lab` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine_lab.config import DataConfig, RefineConfig, TaskConfig, TrainConfig, UpdateConfig
    from refine_lab.estimate import estimate
    from refine_lab.experiments.configs import method_configs
    from refine_lab.experiments.fork import fork
    from refine_lab.experiments.runs import create_runs
    from refine_lab.explore.attribution import write_attribution
    from refine_lab.explore.erasing import erase, erasing_effects
    from refine_lab.explore.lens import layer_lens
    from refine_lab.explore.lifetimes import lifetime_curve, write_lifetimes
    from refine_lab.explore.targets import Target
    from refine_lab.explore.transplant import counterfactual, transplant
    from refine_lab.models import FastWeightLM, State, Trace, load_model, register
    from refine_lab.parity import parity
    from refine_lab.recipes import midtrain, recipe
    from refine_lab.runs.process import follow, resume, start, stop
    from refine_lab.runs.queue import require_finished, run_in_turn, wait_until_finished
    from refine_lab.runs.run import Run, list_runs, runs_dir
    from refine_lab.statistics.contrasts import compare_methods, difference_spread
    from refine_lab.statistics.frontier import compare_frontiers
    from refine_lab.statistics.power import seeds_needed
    from refine_lab.statistics.scores import answer_scores, evaluation_scores
    from refine_lab.sweep import sweep
    from refine_lab.training.adaptation import adapted
    from refine_lab.ttt_config import TTTConfig, TTTRunConfig
    from refine_lab.types import Batch, RewardInputs, Rollouts, SelectionInputs
    from refine_lab.validation import ConfigError

_HOMES = {
    "config": ("DataConfig", "RefineConfig", "TaskConfig", "TrainConfig", "UpdateConfig"),
    "ttt_config": ("TTTConfig", "TTTRunConfig"),
    "validation": ("ConfigError",),
    "types": ("Batch", "RewardInputs", "Rollouts", "SelectionInputs"),
    "models": ("FastWeightLM", "State", "Trace", "load_model", "register"),
    "runs.run": ("Run", "list_runs", "runs_dir"),
    "runs.process": ("follow", "resume", "start", "stop"),
    "runs.queue": ("require_finished", "run_in_turn", "wait_until_finished"),
    "recipes": ("midtrain", "recipe"),
    "training.adaptation": ("adapted",),
    "statistics.contrasts": ("compare_methods", "difference_spread"),
    "statistics.frontier": ("compare_frontiers",),
    "statistics.power": ("seeds_needed",),
    "statistics.scores": ("answer_scores", "evaluation_scores"),
    "experiments.configs": ("method_configs",),
    "experiments.fork": ("fork",),
    "experiments.runs": ("create_runs",),
    "explore.targets": ("Target",),
    "explore.attribution": ("write_attribution",),
    "explore.erasing": ("erase", "erasing_effects"),
    "explore.transplant": ("counterfactual", "transplant"),
    "explore.lens": ("layer_lens",),
    "explore.lifetimes": ("lifetime_curve", "write_lifetimes"),
}
_CALLABLE = ("estimate", "parity", "sweep")
"""Modules that are callable and forward to their function of the same name, which their import would otherwise hide here."""
__all__ = [*_CALLABLE, "refuse_shadows", *(name for names in _HOMES.values() for name in names)]  # pyright: ignore[reportUnsupportedDunderAll]


def refuse_shadows() -> None:
    """Raises ImportError, naming the file, if `import widgets` would find a module other than this project's package.

    Python searches the folder that a notebook is started in before the installed packages. Each notebook calls this
    function before it imports from `widgets`. If a file `refine_lab.py` shadows this package, the failing import of
    this function names it.
    """
    package, found = Path(__file__).parent.parent / "widgets" / "__init__.py", find_spec("widgets")
    if found is None or not package.is_file():
        return  # the import itself names what is missing
    place = found.origin or next(iter(found.submodule_search_locations or ()), "")
    if not package.samefile(place) if found.origin else find_spec("widgets.core.page") is None:
        sentence = f"{place} shadows this project's package `widgets`: rename it, or start in a different folder"
        raise ImportError(sentence)


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"{__name__}.{name}")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
