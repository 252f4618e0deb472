"""Two answers side by side, to be read and copied: before and after a model was adapted."""

from __future__ import annotations

import traitlets

from widgets.core.assets import script, style
from widgets.core.base import Widget


class Answers(Widget):
    """What a model answered `before` and `after`; empty where it has not."""

    _esm = script("answers")
    _css = style("answers")

    before = traitlets.Unicode().tag(sync=True)
    after = traitlets.Unicode().tag(sync=True)

    def __repr__(self) -> str:
        return f"before: {self.before!r}\nafter: {self.after!r}"
