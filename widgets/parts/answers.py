"""Two answers side by side, before and after adaptation, with text that can be copied."""

from __future__ import annotations

import traitlets

from widgets.core.base import Widget


class Answers(Widget):
    """A model's answers `before` and `after` adaptation; empty until they are known."""

    before = traitlets.Unicode().tag(sync=True)
    after = traitlets.Unicode().tag(sync=True)

    def __repr__(self) -> str:
        return f"before: {self.before!r}\nafter: {self.after!r}"
