"""refine_lab: the research workbench for REFINE, "Reinforced Fast Weights with Next-Sequence Prediction" (arXiv 2602.16704).

The method in its order: `selection`, `rollout`, `rewards`, `advantages`, `losses`, `step`; `nested` and `ttt`
run that step in post-training and at test time. Around it: `types` and `config`
(the vocabulary), `recipes` (the paper's numbers), `models` and `ops` (fast weights as a value), `data`, `draws` (keyed
random numbers), `runs` (a run as a directory and a process), `training` (what that process does), `evaluation`,
`parity` (the gate that a model passes before it is trained).

The names below are imported when they are first asked for: who starts a run or reads its records does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine_lab.config import DataConfig, RefineConfig, TrainConfig
    from refine_lab.models import FastWeightLM, State, Trace, load_model
    from refine_lab.parity import parity
    from refine_lab.runs.run import Run, list_runs
    from refine_lab.types import Batch, RewardInputs, Rollouts

__all__ = [
    "Batch",
    "DataConfig",
    "FastWeightLM",
    "RefineConfig",
    "RewardInputs",
    "Rollouts",
    "Run",
    "State",
    "Trace",
    "TrainConfig",
    "list_runs",
    "load_model",
    "parity",
    "refuse_shadows",
]

_HOMES = {
    "config": ("DataConfig", "RefineConfig", "TrainConfig"),
    "models": ("FastWeightLM", "State", "Trace", "load_model"),
    "runs.run": ("Run", "list_runs"),
    "types": ("Batch", "RewardInputs", "Rollouts"),
}


def refuse_shadows() -> None:
    """Raise ImportError, naming the file, where `import widgets` would find another module than this project's package.

    Python looks in the folder that a notebook is started in before it looks among the installed packages. Each notebook
    calls this before it imports from `widgets`. A file `refine_lab.py` is named by the failing import of this function.
    """
    ours, found = Path(__file__).parent.parent / "widgets" / "__init__.py", find_spec("widgets")
    if found is None or not ours.is_file():
        return  # the import itself says what is missing
    place = found.origin or next(iter(found.submodule_search_locations or ()), "")
    hidden = not ours.samefile(place) if found.origin else find_spec("widgets.core.page") is None
    if hidden:
        raise ImportError(
            f"{place} is in the way of this project's package `widgets`: rename it, or start in another folder"
        )


def __getattr__(name: str) -> Any:
    if name == "parity":  # a module that can be called as its function: an import of it binds this name to it anyway
        return import_module(f"{__name__}.parity")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
