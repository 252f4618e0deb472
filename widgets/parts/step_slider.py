"""A slider over whole numbers, such as the steps of a run, with a number and a label."""

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
    "The chosen number."
    label = traitlets.Unicode("step").tag(sync=True)
    "Description beside the slider, which is also its name for screen readers."
    help = traitlets.Unicode().tag(sync=True)
    "The glossary's sentence about the number, shown as a tooltip."
    unit = traitlets.Unicode().tag(sync=True)
    "Unit shown after the number; empty: the number is shown as one of `last`, as in `3 of 8`."
    disabled = traitlets.Bool(False).tag(sync=True)
    "Whether there is nothing to choose."

    def __repr__(self) -> str:
        number = f"{self.value} {self.unit}" if self.unit else f"{self.value} of {self.last}"
        return f"StepSlider: {self.label} {number}" + (", disabled" if self.disabled else "")

    _check_first = bounded("first", lambda self: (0, None))
    _check_last = bounded("last", lambda self: (self.first, None))
    _check_value = bounded("value", lambda self: (self.first, self.last))

    @traitlets.observe("first", "last")
    def _clamp_value(self, change: Any) -> None:
        self.value = min(max(self.value, self.first), self.last)
