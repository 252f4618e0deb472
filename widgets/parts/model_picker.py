"""Fields for the name of a model or of a run, with a list of those that exist; any other name can be typed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from refine_lab.explore.adapted import saved_models
from refine_lab.models.hub import IN_RUNS, SHIPPED, own_folder, shipped
from refine_lab.runs.files import is_run, parquet_parts
from refine_lab.runs.run import Run, list_runs, runs_dir
from widgets.core.glossary import explain
from widgets.figures.series import method_styles
from widgets.parts.entry_field import Choice, EntryField

MOST_RUNS = 200
"""Maximum number of runs, and of folders of saved weights, in the list, newest first."""
HINT = "a shipped model, a run, a checkpoint"
"""Text of an empty field."""


def run_words(run: Run, step: int | None = None) -> str:
    """Returns a run in words: its method, seed and name, its state unless it has finished, and the step of a checkpoint."""
    words = f"{method_styles([run.config.method])[run.config.method].label}, seed {run.config.seed}"
    words += f", step {step}" if step is not None else ""
    state = _state(run)
    return f"{words}{'' if state == 'finished' else f', {state}'} – {run.name}"


def model_words(model: str) -> str:
    """Returns a model in words: for a run or one of its checkpoints `run_words`, else its name."""
    folder = None if shipped(model) else own_folder(model)
    try:
        if folder is None:
            return f"{model} (shipped model)" if shipped(model) else model
        folder = folder.absolute()
        if is_run(folder):
            return run_words(Run(folder))
        step = folder.name.removeprefix("step-")
        if folder.parent.name == "checkpoints" and step.isdigit() and is_run(folder.parents[1]):
            return run_words(Run(folder.parents[1]), int(step))
    except (OSError, ValueError):
        pass  # a damaged run still has a name
    return model


def _state(run: Run) -> str:
    try:
        return run.state
    except (OSError, ValueError):
        return "unreadable"


def model_choices() -> list[Choice]:
    """Returns the models that `load_model` finds: shipped ones, saved weights, and runs with a checkpoint.

    Saved weights are those of adapted models in the folder of runs. They and the runs are listed newest first. `runs/NAME`
    stands for the run's last checkpoint; an earlier one is `runs/NAME/checkpoints/step-N`. Runs that cannot be read are
    left out.
    """
    names = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())
    choices = [Choice(name, name, "shipped models") for name in names]
    if not runs_dir().is_dir():
        return choices
    for folder in saved_models()[:MOST_RUNS]:
        choices.append(Choice(f"{IN_RUNS}{folder.name}", folder.name, "saved weights"))
    for run in _newest_runs()[:MOST_RUNS]:
        choices += _of_run(run)
    return choices


def _of_run(run: Run) -> Iterator[Choice]:
    """Yields the run's last checkpoint, and then each of its checkpoints, the last one first."""
    saved = run.checkpoints() if run.kind == "train" else []
    if saved:
        group = "finished runs" if _state(run) == "finished" else "other runs"
        yield Choice(f"{IN_RUNS}{run.name}", run_words(run), group)
        for step, path in reversed(saved):
            yield Choice(f"{IN_RUNS}{run.name}/checkpoints/{path.name}", run_words(run, step), "checkpoints")


def model_names() -> list[str]:
    """Returns the names of `model_choices`."""
    return [choice.value for choice in model_choices()]


def recorded_choices() -> list[Choice]:
    """Returns the training runs that have recorded rollouts, as `runs/NAME`, newest first."""
    if not runs_dir().is_dir():
        return []
    recorded = [run for run in _newest_runs() if run.kind == "train" and parquet_parts(run.path / "rollouts")]
    return [Choice(f"{IN_RUNS}{run.name}", run_words(run), "runs") for run in recorded[:MOST_RUNS]]


def _newest_runs() -> list[Run]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged runs, which the run monitor names
        return [*reversed(list_runs())]


class ModelPicker(EntryField):
    """A field for a name, with a list in words; `update` reads the list again, as the page does when it is used.

    `source` returns the entries: models (`model_choices`), or runs (`recorded_choices`).
    """

    def __init__(self, source: Callable[[], list[Choice]] = model_choices, **options: Any) -> None:
        self.source = source
        super().__init__(**options)

    @property
    def options(self) -> list[str]:
        """Returns the names in the list."""
        return [value for value, _, _ in self.choices]

    def update(self) -> None:
        """Reads the list again; what is typed stays."""
        self.show_choices(self.source())


def model_picker(
    label: str, value: str = "", width: str = "36em", choices: Sequence[Choice] | None = None
) -> ModelPicker:
    """Returns a field for a model's name, with its label in front; the name is sent when it is entered or chosen.

    `choices`: the entries of the list; none: those of `model_choices` now.
    """
    listed = model_choices() if choices is None else choices
    return _picker(label, value, width, listed, placeholder=HINT, list_label="choose a model or a run")


def run_picker(label: str, placeholder: str, width: str = "26em") -> ModelPicker:
    """Returns a field for the name of a run with recorded rollouts, with its label in front."""
    listed = recorded_choices()
    return _picker(
        label, "", width, listed, placeholder=placeholder, list_label="choose a run", source=recorded_choices
    )


def _picker(label: str, value: str, width: str, choices: Sequence[Choice], **options: Any) -> ModelPicker:
    made = ModelPicker(label=label, value=value, help=explain(label), width=width, **options)
    made.show_choices(choices)
    return made
