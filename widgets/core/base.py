"""What every widget of ours shares: its script and style, and errors that are shown where the user looks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from refine_lab.config import require
from widgets.core.page import save_page


def sentence(error: Exception) -> str:
    """What an error says to people: a ValueError is written for them, of another the type helps. No lone surrogates."""
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return said.encode("utf-8", "replace").decode("utf-8")


def guarded(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A method called by the page or a thread: what it raises is shown as the widget's `error`, and never lost.

    Jupyter drops what such a call raises or prints. The error goes when the same method ends well; that of another stays.
    """

    @wraps(callback)
    def run(self: Widget, *args: Any, **kwargs: Any) -> Any:
        try:
            result = callback(self, *args, **kwargs)
        except Exception as error:  # the edge to the page: raised further, nobody would ever see it
            self.error, self._failed = sentence(error), callback.__name__
            return None
        if getattr(self, "_failed", None) == callback.__name__:
            self.error, self._failed = "", None
        return result

    return run


def bounded(trait: str, bounds: Callable[[Any], tuple[int, int]]) -> Any:
    """A check of a widget's trait, which must be from the first to the second of `bounds(widget)`."""

    def check(self: Widget, proposal: Any) -> int:
        (low, high), value = bounds(self), proposal["value"]
        require(low <= value <= high, trait, value, f"from {low} to {high}")
        return value

    return traitlets.validate(trait)(check)


class Widget(anywidget.AnyWidget):
    """A widget drawn by `static/<name>.js`; Python holds and checks the data.

    Every subclass sets `_esm = script(name)` and `_css = style(name)`, has a `__repr__` that says in text what it shows, and
    is used without a page by its traits alone.
    """

    _esm: str
    _css: str
    _failed: str | None = None  # the method whose error is shown
    error = traitlets.Unicode().tag(sync=True)
    "What went wrong last, in a sentence; empty where nothing did."
    status = traitlets.Unicode().tag(sync=True)
    "What happens now, read out by screen readers."

    def page_state(self) -> dict[str, Any]:
        """The synced traits of our own as they are sent, by name: what a page without Python draws (see `page.save_page`)."""
        names = set(self.trait_names(sync=True)) - set(anywidget.AnyWidget.class_trait_names(sync=True))
        return self.get_state(sorted(name for name in names if not name.startswith("_")))

    def save_html(self, path: Path | str, title: str = "refine_lab") -> Path:
        """Write one HTML file that works offline, as it looks now; the path. See `page.save_page`."""
        return save_page(path, self, title=title)
