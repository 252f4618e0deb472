"""The settings of the reward explorer: their fields, presets, undo, and the cancellation of what they requested."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from refine_lab.config import BUILT_IN_SELECTIONS
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.reward_job import RewardJob
from refine_lab.validation import require
from widgets.core.base import guarded
from widgets.core.panel import Panel
from widgets.parts.controls import explorer_fields
from widgets.parts.number_field import NumberField, show_refusals
from widgets.parts.settings_bar import SettingsBar, copies, difference, presets

MOST_CHANGES = 100
"""Number of changes that can be undone."""

ONLY_READ = "Cancelled. The document had already been read; it has no rollouts."
"""Status after a cancellation between the reading of a document and its rollouts."""


class SettingsPanel(Panel):
    """The base of the reward explorer: an exploration, and the fields and buttons of its settings.

    A change requests what it needs and cancels what an earlier change requested. The settings of the rollouts that are
    shown are kept, so that a cancelled change can be taken back.
    """

    _job: RewardJob | None = None
    # settings of the rollouts shown, and the settings before them
    _shown: tuple[dict[str, Any], list[dict[str, Any]]] | None = None

    def __init__(self, exploration: Exploration) -> None:
        super().__init__()
        self.exploration = exploration
        self._lock = threading.RLock()
        self._history: list[dict[str, Any]] = []
        self._cancellations = 0
        self._clicked: list[int] = []
        self._wanted: int | None = None
        settings = exploration.settings
        selections = [*BUILT_IN_SELECTIONS, *exploration.selections]
        self.controls = explorer_fields([*exploration.rewards], selections, settings.__getitem__)
        self.presets = presets(exploration.model)
        "Settings by the name of their preset."
        self.bar = SettingsBar(self._on_bar, presets=[*self.presets])
        for name, control in self.controls.items():
            control.observe(partial(self._on_control, name), "value")
        show_refusals(self, self.controls.values())
        self._show_settings()

    # -- public methods -----------------------------------------------------------------------------------------------

    def change(self, name: str, value: Any) -> Future[Any]:
        """Sets a control by name, as in the page. Raises ValueError for an invalid value, and then changes nothing."""
        require(name in self.controls, "a control", name, f"one of {', '.join(self.controls)}")
        return self.apply({name: value})

    def apply(self, settings: Mapping[str, Any]) -> Future[Any]:
        """Sets several controls in one change. Raises as `change`."""
        before = self.exploration.settings
        asked = self._set(settings)
        if self.exploration.settings != before:
            self._history = [*self._history, before][-MOST_CHANGES:]
        self._show_settings()
        return asked()

    def preset(self, name: str) -> Future[Any]:
        """Applies a preset: `paper`, `demo`, or, if the model is a run, `this run's recipe`."""
        require(name in self.presets, "a preset", name, f"one of {', '.join(self.presets)}")
        return self.apply(self.presets[name])

    def undo(self) -> Future[Any]:
        """Returns to the settings before the last change. Raises ValueError if there is none."""
        if not self._history:
            raise ValueError("there is no change of settings to undo")
        asked = self._set(self._history[-1])
        self._history = self._history[:-1]
        self._show_settings()
        return asked()

    def cancel(self) -> None:
        """Cancels what is pending: the reading of a document, which leaves the one shown, and rollouts and rewards.

        The settings are then those of the rollouts that are shown. A document that has already been read is shown without
        rollouts, and the status says so.
        """
        with self._lock:
            self._cancellations += 1
            self._wanted = None
            if self._shown is not None:
                settings, self._history = self._shown
                self.exploration.set(**settings)
            self.exploration.cancel_reading()
            self.exploration.cancel()
            if self._job is not None:
                self._job.cancel()
            if self.exploration.document is not None:
                self._clicked = [*filter(self.exploration.covers, self._clicked)]
            said = "Cancelled." if self.exploration.document is None else ONLY_READ
            self.report("Cancelled. The settings are those of the rollouts shown." if self._shown else said)
        self._show_settings()

    @property
    def copies(self) -> dict[str, str]:
        """Returns the settings as `Python`, as `JSON` and as options of `papermill`."""
        return copies(self.exploration.model, self.exploration.settings)

    def close(self) -> None:
        if self._job is not None:
            self._job.cancel()
        super().close()

    # -- for the explorer -----------------------------------------------------------------------------------------------

    def _wanted_positions(self) -> list[int]:
        raise NotImplementedError

    def _roll_out(self, positions: Sequence[int]) -> Future[Any]:
        raise NotImplementedError

    def _set(self, settings: Mapping[str, Any]) -> Any:
        """Changes the settings, and returns the function that requests their rollouts; raises and changes nothing."""
        for name, value in settings.items():
            control = self.controls[name]
            if isinstance(control, NumberField):
                control.checked(value, name)
        before = self.exploration.settings
        self.exploration.set(**settings)
        try:
            wanted = self._wanted_positions()
        except (ValueError, RuntimeError):  # a custom selection raises RuntimeError
            self.exploration.set(**before)
            raise
        return lambda: self._roll_out(wanted)

    def _settings_shown(self) -> None:
        """Records that the rollouts of the current settings are shown."""
        self._shown = self.exploration.settings, self._history  # a change makes a new list

    @property
    def _shown_settings(self) -> dict[str, Any]:
        """Returns the settings of the rollouts that are shown; those in the fields may be later ones, or have failed."""
        return self.exploration.settings if self._shown is None else self._shown[0]

    def _show_settings(self) -> None:
        """Shows the settings in the fields and in the bar."""
        settings = self.exploration.settings
        for name, control in self.controls.items():
            if control.value != settings[name]:
                control.value = settings[name]
        equal = [name for name, preset in self.presets.items() if preset.items() <= settings.items()]
        labels = {name: _label(control) for name, control in self.controls.items()}
        with self.bar.hold_sync():
            self.bar.preset = equal[0] if equal else ""
            self.bar.note = difference(settings, self.presets["paper"], labels)
            self.bar.copies = [[name, text] for name, text in self.copies.items()]
            self.bar.can_undo = bool(self._history)

    def busy_changed(self, busy: bool) -> None:
        """Shows whether a request is pending, and then whether the rollouts belong to the settings."""
        self.bar.can_cancel = busy
        self.notice.stale = not busy and self._outdated()
        super().busy_changed(busy)

    def _outdated(self) -> bool:
        """Returns whether what is shown belongs to earlier settings."""
        return self._shown is not None and self._shown[0] != self.exploration.settings

    # -- events of the page --------------------------------------------------------------------------------------------

    @guarded
    def _on_control(self, name: str, change: Any) -> None:
        if change["new"] == self.exploration.settings[name]:
            return
        try:
            self.change(name, change["new"])
        except (ValueError, RuntimeError):
            self.controls[name].value = self.exploration.settings[name]
            raise

    @guarded
    def _on_bar(self, act: str, name: str) -> None:
        try:
            {"preset": lambda: self.preset(name), "undo": self.undo, "cancel": self.cancel}[act]()
        finally:
            self._show_settings()


def _label(control: Any) -> str:
    return control.label if isinstance(control, NumberField) else control.description
