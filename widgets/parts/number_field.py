"""A field for a number, which shows its range and refuses other values instead of changing them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import traitlets

from refine_lab.validation import require
from widgets.core.base import Widget, guarded
from widgets.core.panel import Panel


class NumberField(Widget):
    """A number from `min` to `max`, typed or changed by the arrow keys.

    What is typed is checked in Python: another value is refused with `error`, and the previous value stays. Raises
    ValueError for such a value that is set in Python.
    """

    min = traitlets.Float(0).tag(sync=True)
    "The lowest value."
    max = traitlets.Float(1).tag(sync=True)
    "The highest value."
    step = traitlets.Float(1).tag(sync=True)
    "Change of the value per press of an arrow key."
    whole = traitlets.Bool(True).tag(sync=True)
    "Whether the number must be whole."
    value = traitlets.Any(0).tag(sync=True)
    "The number."
    label = traitlets.Unicode().tag(sync=True)
    "Description in front of the field."
    help = traitlets.Unicode().tag(sync=True)
    "The glossary's sentence about the number, shown as a tooltip."

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.on_msg(self._on_message)

    @property
    def allowed(self) -> str:
        """Returns which numbers are allowed, in words."""
        kind = "a whole number " if self.whole else ""
        return f"{kind}from {_number(self.min)} to {_number(self.max)}"

    def checked(self, value: Any, name: str = "") -> float:
        """Returns a number as it is kept, whole if it must be. Raises ValueError, with the name, unless it is allowed."""
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and self.min <= value <= self.max
        require(valid and (not self.whole or value == int(value)), name or self.label, value, self.allowed)
        return int(value) if self.whole else value

    @traitlets.validate("value")
    def _check_value(self, proposal: Any) -> float:
        return self.checked(proposal["value"])

    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        if "typed" in content:
            self.error = ""  # the same error is announced again
            self._take(str(content["typed"]))
            self.send({"value": self.value})

    @guarded
    def _take(self, text: str) -> None:
        try:
            number = float(text)
        except ValueError:
            self.checked(text or "nothing")
            return
        self.value = self.checked(int(number) if number.is_integer() else number)

    def __repr__(self) -> str:
        return f"NumberField: {self.label} {self.value}, {self.allowed}"


def show_refusals(panel: Panel, fields: Iterable[Any]) -> None:
    """Displays what the number fields among `fields` refuse as the panel's error."""
    for each in fields:
        if isinstance(each, NumberField):
            each.observe(panel.on_refused, "error")


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
