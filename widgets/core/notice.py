"""A status line and an error line, both announced by screen readers, and the sign that a panel is busy."""

from __future__ import annotations

from typing import Any

import traitlets

from refine_lab.text import printable
from widgets.core.base import Widget


class Notice(Widget):
    """The messages of a composite widget: `status` and `error`, each empty if there is none.

    The page marks the panel as busy at once when a control in it is used, and until Python has answered and is no
    longer busy.
    """

    busy = traitlets.Bool(False).tag(sync=True)
    "Whether a request is pending."
    stale = traitlets.Bool(False).tag(sync=True)
    "Whether the numbers that are shown belong to earlier settings."
    asked = traitlets.Int(0).tag(sync=True)
    "Number of uses of a control; the page counts them."
    answered = traitlets.Int(0).tag(sync=True)
    "The last of these uses that has reached Python."

    @traitlets.observe("asked")
    def _answer(self, change: Any) -> None:
        self.answered = change["new"]

    def lines(self) -> list[str]:
        """Returns the messages as lines of text."""
        return [printable(line) for line in (self.status, self.error and f"error: {self.error}") if line]

    def __repr__(self) -> str:
        return "\n".join(self.lines()) or "no messages"
