"""Fields for the name of a model or of a run, which list the names that exist and accept any other name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

from refine_lab.explore.adapted import saved_models
from refine_lab.models.hub import IN_RUNS, SHIPPED
from refine_lab.runs.files import parquet_parts
from refine_lab.runs.run import Run, list_runs, runs_dir
from refine_lab.text import replace_surrogates
from widgets.parts.controls import field

MOST_RUNS = 200
"""Maximum number of runs, and of folders of saved weights, in the list, newest first."""
HINT = "a shipped model, a run, a checkpoint"
"""Text of an empty field."""


def model_names() -> list[str]:
    """Returns names for `load_model`: shipped models, saved weights, and runs with a checkpoint, each with its checkpoints.

    Saved weights are those of adapted models in the folder of runs. They and the runs are listed newest first. `runs/NAME`
    stands for the run's last checkpoint; an earlier one is `runs/NAME/checkpoints/step-N`. Runs that cannot be read are
    left out.
    """
    names = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())
    if not runs_dir().is_dir():
        return names
    names += [f"{IN_RUNS}{folder.name}" for folder in saved_models()[:MOST_RUNS]]
    for run in _newest_runs()[:MOST_RUNS]:
        saved = run.checkpoints() if run.kind == "train" else []
        if saved:
            names.append(f"{IN_RUNS}{run.name}")
            names += [f"{IN_RUNS}{run.name}/checkpoints/{path.name}" for _, path in reversed(saved)]
    return names


def recorded_runs() -> list[str]:
    """Returns the names of the training runs that have recorded rollouts, as `runs/NAME`, newest first."""
    if not runs_dir().is_dir():
        return []
    recorded = [run for run in _newest_runs() if run.kind == "train" and parquet_parts(run.path / "rollouts")]
    return [f"{IN_RUNS}{run.name}" for run in recorded[:MOST_RUNS]]


def _newest_runs() -> list[Run]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged runs, which the run monitor names
        return [*reversed(list_runs())]


class ModelPicker(ipywidgets.Combobox):
    """A combobox that lists names and also accepts a typed name; `update` reads the list again.

    `names` returns the names to list: those of models (`model_names`), or of runs (`recorded_runs`).
    """

    def __init__(self, names: Callable[[], list[str]] = model_names, **options: Any) -> None:
        self.names = names
        super().__init__(**options)

    def update(self) -> None:
        """Reads the list again; what is typed stays."""
        self.options = self.names()

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Overrides `set_state`: an unpaired surrogate, which messages cannot carry, becomes U+FFFD."""
        super().set_state(
            {name: replace_surrogates(value) if isinstance(value, str) else value for name, value in sync_data.items()}
        )


def model_picker(label: str, value: str = "", width: str = "36em", options: Sequence[str] | None = None) -> ModelPicker:
    """Returns a field for a model's name, with its label in front; the name is sent when it is entered or chosen.

    `options`: the names to list; none: those of `model_names` now.
    """
    listed = model_names() if options is None else [*options]
    settings = {"placeholder": HINT, "continuous_update": False, "ensure_option": False}
    return field(ModelPicker, label, value, width, options=listed, **settings)


def run_picker(label: str, placeholder: str, width: str = "26em") -> ModelPicker:
    """Returns a field for the name of a run with recorded rollouts, with its label in front."""
    settings = {"placeholder": placeholder, "continuous_update": False, "ensure_option": False, "names": recorded_runs}
    return field(ModelPicker, label, "", width, options=recorded_runs(), **settings)
