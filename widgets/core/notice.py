"""A line that says what happens now, and a line that says what went wrong: read out by screen readers, in place."""

from __future__ import annotations

from widgets.core.assets import script, style
from widgets.core.base import Widget


class Notice(Widget):
    """What a composition of several widgets says: `status` and `error`, of which each is empty where there is nothing."""

    _esm = script("notice")
    _css = style("notice")

    def __repr__(self) -> str:
        lines = [self.status, f"error: {self.error}" if self.error else ""]
        return "\n".join(line for line in lines if line) or "no messages"
