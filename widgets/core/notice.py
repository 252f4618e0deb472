"""A status line and an error line, both announced by screen readers."""

from __future__ import annotations

from widgets.core.assets import script, style
from widgets.core.base import Widget


class Notice(Widget):
    """The messages of a composite widget: `status` and `error`, each empty if there is none."""

    _esm = script("notice")
    _css = style("notice")

    def __repr__(self) -> str:
        lines = [self.status, f"error: {self.error}" if self.error else ""]
        return "\n".join(line for line in lines if line) or "no messages"
