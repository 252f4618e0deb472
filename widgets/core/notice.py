"""A status line and an error line, both announced by screen readers."""

from __future__ import annotations

from refine_lab.text import printable
from widgets.core.base import Widget


class Notice(Widget):
    """The messages of a composite widget: `status` and `error`, each empty if there is none."""

    def lines(self) -> list[str]:
        """Returns the messages as lines of text."""
        return [printable(line) for line in (self.status, self.error and f"error: {self.error}") if line]

    def __repr__(self) -> str:
        return "\n".join(self.lines()) or "no messages"
