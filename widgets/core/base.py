"""The base class of all widgets: their script and style, and errors displayed in the widget."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from refine_lab.text import printable
from refine_lab.validation import require
from widgets.core.assets import STATIC, script, style
from widgets.core.page import save_page


def sentence(error: Exception) -> str:
    """Returns an error's text for users, with its type unless that says nothing more, and control characters escaped."""
    text = str(error) if isinstance(error, (ValueError, FloatingPointError)) else f"{type(error).__name__}: {error}"
    return printable(text)


def guarded(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method that the page or a thread calls, so that an exception is displayed as the widget's `error`.

    Jupyter discards what such a call raises or prints. The error is cleared when the same method is called again; other
    methods do not clear it.
    """

    @wraps(callback)
    def run(self: Widget, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_failed", None) == callback.__name__:
            self.error, self._failed = "", None  # before the call, which may set an error of its own
        try:
            return callback(self, *args, **kwargs)
        except Exception as error:  # an exception that propagates from here is never displayed
            self.error, self._failed = sentence(error), callback.__name__
            return None

    return run


def bounded(trait: str, bounds: Callable[[Any], tuple[int, int | None]]) -> Any:
    """Returns a validator for a widget's integer trait, which must lie within `bounds(widget)`, both ends included.

    None as the upper end means that there is none.
    """

    def check(self: Widget, proposal: Any) -> int:
        (low, high), value = bounds(self), proposal["value"]
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        require(low <= value and (high is None or value <= high), trait, value, allowed)
        return value

    return traitlets.validate(trait)(check)


class Widget(anywidget.AnyWidget):
    """A widget drawn by JavaScript; Python holds and validates the data.

    The script and the style sheet of a subclass are `static/<name>.js` and `static/<name>.css`, named like its module.
    Every subclass has a `__repr__` that describes its content as text, and works without a page through its traits.
    """

    _esm: str
    _css: str
    page_heading = ""
    "The heading above the widget on a saved page, where it has one."
    _failed: str | None = None  # the method that raised the displayed `error`
    error = traitlets.Unicode().tag(sync=True)
    "The last error, in one sentence; empty without an error."
    status = traitlets.Unicode().tag(sync=True)
    "The current activity, announced by screen readers."

    def __init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.__module__.rpartition(".")[2]
        if "_esm" not in vars(cls) and (STATIC / f"{name}.js").is_file():
            cls._esm, cls._css = script(name), style(name)
        super().__init_subclass__(**kwargs)

    def page_state(self) -> dict[str, Any]:
        """Returns the subclass's synced traits by name, for a page without Python (see `page.save_page`)."""
        names = {*self.trait_names(sync=True)} - {*anywidget.AnyWidget.class_trait_names(sync=True)}
        return self.get_state(sorted(name for name in names if not name.startswith("_")))

    def save_html(self, path: Path | str, title: str = "refine_lab") -> Path:
        """Writes one offline HTML file with the widget's current view, and returns its path. See `page.save_page`."""
        return save_page(path, self, title=title)
