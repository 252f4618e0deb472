"""A slider over the steps of a run, with a number and a label."""

from __future__ import annotations

from typing import Any

import traitlets

from widgets.core.base import Widget, bounded


class StepSlider(Widget):
    """A whole number from `first` to `last`, chosen by dragging, arrows, Home, End, Page Up and Page Down.

    `value` changes when the slider is released, not while it is dragged. Raises ValueError for a value outside `first`
    to `last`, and for ends in the wrong order; changed ends clamp the value.
    """

    first = traitlets.Int(0).tag(sync=True)
    "The beginning of the slider."
    last = traitlets.Int(0).tag(sync=True)
    "The end of the slider."
    value = traitlets.Int(0).tag(sync=True)
    "The chosen step."
    label = traitlets.Unicode("step").tag(sync=True)
    "Description beside the slider, which is also its name for screen readers."
    disabled = traitlets.Bool(False).tag(sync=True)
    "Whether there is nothing to choose."

    def __repr__(self) -> str:
        return f"StepSlider: {self.label} {self.value} of {self.last}" + (", disabled" if self.disabled else "")

    _check_first = bounded("first", lambda self: (0, None))
    _check_last = bounded("last", lambda self: (self.first, None))
    _check_value = bounded("value", lambda self: (self.first, self.last))

    @traitlets.observe("first", "last")
    def _clamp_value(self, change: Any) -> None:
        self.value = min(max(self.value, self.first), self.last)
