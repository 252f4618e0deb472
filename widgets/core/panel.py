"""A panel: a column of widgets that start background work and display its errors in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ipywidgets
import traitlets

from refine_lab.explore.futures import RequestCancelled
from widgets.core.base import guarded, sentence
from widgets.core.notice import Notice


class FileField(ipywidgets.FileUpload):
    """A file upload button whose contents are never sent back to a page, since they are binary data inside a list."""

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        state = super().get_state(key, drop_defaults)
        if "value" in state:
            state["value"] = [{name: item[name] for name in item if name != "content"} for item in state["value"]]
        return state


class Panel(ipywidgets.VBox):
    """The base of the workbench's panels: a `notice`, and a chain of futures whose errors are displayed there.

    A panel never blocks on its requests, and no exception raised in them is lost. `notice.busy` is true while one is pending.
    """

    _followed: list[tuple[traitlets.HasTraits, Callable[[Any], None], str]] | None = None
    "None if the constructor failed: Python closes such a panel, too."

    def __init__(self) -> None:
        self.notice = Notice()
        self._pending, self._counting = 0, threading.RLock()
        self._followed = []
        super().__init__()
        self.add_class("refine-panel")  # the notice's script keeps keys that are pressed inside this class

    @traitlets.observe("children")
    def _on_children(self, change: Any) -> None:
        """Gives an empty tooltip to widgets without one, for which ipywidgets would show "null"."""
        inside = [*change["new"]]
        for widget in inside:
            inside += getattr(widget, "children", ())
            if getattr(widget, "tooltip", "") is None:
                widget.tooltip = ""

    def observe_other(self, widget: traitlets.HasTraits, call: Callable[[Any], None], trait: str) -> None:
        """Calls `call` when a trait of another widget changes, until this panel is closed."""
        widget.observe(call, trait)
        assert self._followed is not None
        self._followed.append((widget, call, trait))

    def end_following(self) -> None:
        """Ends all calls of `observe_other`."""
        while self._followed:
            widget, call, trait = self._followed.pop()
            widget.unobserve(call, trait)

    def close(self) -> None:
        self.end_following()
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Includes the full text, which a box would truncate after 110 characters."""
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle if bundle is None else bundle | {"text/plain": repr(self)}

    @property
    def error(self) -> str:
        """Returns the last error; empty without an error."""
        return self.notice.error

    @error.setter
    def error(self, text: str) -> None:
        self.notice.error = text

    def report(self, text: str) -> None:
        """Sets the status."""
        self.notice.status = text

    def button(self, method: str, tooltip: str, description: str = "", style: str = "") -> ipywidgets.Button:
        """Returns a button that calls the method of that name and displays what it raises as the panel's error."""
        button = ipywidgets.Button(description=description or method.capitalize(), tooltip=tooltip, button_style=style)
        button.on_click(lambda _: self._pressed(method))
        return button

    @guarded
    def _pressed(self, method: str) -> None:
        getattr(self, method)()

    @guarded
    def on_refused(self, change: Any) -> None:
        """Displays the error of a field that checks a number (`parts.number_field`); observes its `error`."""
        if change["new"]:
            raise ValueError(change["new"])

    def after(self, begin: Callable[[], Any], *then: Callable[[Any], Any]) -> Future[Any]:
        """Calls `begin`, passes each result to the next function, and returns a future of the last result.

        Each function may return a future, whose result is then passed on. An exception ends the chain: it is displayed,
        and the returned future raises it. RequestCancelled ends it as well, and the returned future's result is None.
        """
        following: Future[Any] = Future()

        def advance(step: Callable[[], Any], rest: Sequence[Callable[[Any], Any]]) -> None:
            try:
                result = step()
            except RequestCancelled:
                self._count(-1)
                following.set_result(None)
                return
            except Exception as error:  # the future raises it
                self.report("")
                self.error = sentence(error)
                self._count(-1)
                following.set_exception(error)
                return
            if isinstance(result, Future):
                result.add_done_callback(lambda finished: advance(finished.result, rest))
            elif rest:
                advance(lambda: rest[0](result), rest[1:])
            else:
                self._count(-1)
                following.set_result(result)

        self.error = ""
        self._count(1)
        advance(begin, then)
        return following

    def _count(self, by: int) -> None:
        """Adds to the number of pending requests."""
        with self._counting:
            self._pending += by
            self.busy_changed(self._pending > 0)

    def busy_changed(self, busy: bool) -> None:
        """Shows whether a request is pending; called when one begins or ends."""
        self.notice.busy = busy
