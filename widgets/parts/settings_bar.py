"""The bar below the explorer's settings: presets, undo, cancel, and copies of the settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import traitlets

from refine_lab.models.hub import own_folder, shipped
from refine_lab.recipes import recipe
from refine_lab.runs.files import is_run
from refine_lab.runs.run import Run
from widgets.core.base import Widget, guarded

RUN = "this run's recipe"
METHOD_FIELDS = (
    *("group_by", "rollout_length", "group_size", "temperature"),
    *("num_chunks", "selection", "tau", "smoothing_kernel", "reward"),
)
"""Fields of `RefineConfig` that a preset sets."""
NOTEBOOK = "papermill notebooks/explore.ipynb out.ipynb"


def presets(model: str) -> dict[str, dict[str, Any]]:
    """Returns settings by the name of their preset: the paper's, the demo's, and those of `model` if it is a run.

    A run's settings are left out if it did not use rollouts, if it used a custom reward or selection, and if its
    configuration cannot be read.
    """
    found = {"paper": recipe("paper_midtrain").make().refine, "demo": recipe("midtrain").make().refine}
    folder = None if shipped(model) else own_folder(model)
    if folder is not None and is_run(folder):
        with suppress(OSError, ValueError):  # a damaged run, which the run monitor names
            config = Run(folder).config.refine
            if config is not None and config.rolls_out and "custom" not in (config.reward, config.selection):
                found[RUN] = config
    return {name: {field: getattr(config, field) for field in METHOD_FIELDS} for name, config in found.items()}


def copies(model: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings as Python, as JSON for papermill's `--parameters_yaml`, and as its `-p` options."""
    values = {"model": model, **settings}
    lines = [f"    {model!r},", f"    settings={dict(settings)!r},"]
    options = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in values.items())
    return {
        "Python": "\n".join(["RewardExplorer(", *lines, ")"]),
        "JSON": json.dumps(values),
        "papermill": f"{NOTEBOOK} {options}",
    }


class SettingsBar(Widget):
    """Buttons for presets, undo, cancel and copies; `act(what, name)` is called when one is pressed."""

    presets = traitlets.List(traitlets.Unicode()).tag(sync=True)
    "Names of the presets."
    preset = traitlets.Unicode().tag(sync=True)
    "The preset that the settings equal; empty for none."
    note = traitlets.Unicode().tag(sync=True)
    "How the settings differ from the paper's."
    copies = traitlets.List(traitlets.List(traitlets.Unicode())).tag(sync=True)
    "Label and text of each form in which the settings are copied."
    can_undo = traitlets.Bool(False).tag(sync=True)
    "Whether there is a change to undo."
    can_cancel = traitlets.Bool(False).tag(sync=True)
    "Whether a request is pending."

    def __init__(self, act: Callable[[str, str], object], **options: Any) -> None:
        self._act = act
        super().__init__(**options)
        self.on_msg(self._on_message)

    @guarded
    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        if content.get("act") in ("preset", "undo", "cancel"):
            self._act(content["act"], str(content.get("name", "")))

    def __repr__(self) -> str:
        return f"SettingsBar: {self.preset or 'no preset'}. {self.note}"


def difference(settings: Mapping[str, Any], preset: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Describes in which settings `settings` differ from the paper's."""
    parts = [
        f"{labels.get(name, name)} {settings[name]} (paper: {value})"
        for name, value in preset.items()
        if settings[name] != value
    ]
    return f"Unlike the paper: {', '.join(parts)}." if parts else "The paper's settings."
