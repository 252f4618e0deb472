"""A panel: several widgets one under the other around work that somebody else does, with what goes wrong in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ipywidgets
import traitlets

from refine_lab.data.text import sound
from widgets.core.base import sentence
from widgets.core.notice import Notice


class TextField(ipywidgets.Textarea):
    """A text area that takes whatever a page sends, once it is left: a button pressed then finds all of it.

    Sent letter by letter, the last of them could come after the button where the kernel is busy. Half of a surrogate pair
    becomes U+FFFD: no message carries it back, and ipywidgets would drop the text without a word.
    """

    continuous_update = traitlets.Bool(False).tag(sync=True)

    def set_state(self, sync_data: dict[str, Any]) -> None:
        super().set_state(
            {name: sound(value) if isinstance(value, str) else value for name, value in sync_data.items()}
        )


class FileField(ipywidgets.FileUpload):
    """A button that takes files, whose contents are never sent back to a page: they are binary data inside a list."""

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        state = super().get_state(key, drop_defaults)
        if "value" in state:
            state["value"] = [{name: item[name] for name in item if name != "content"} for item in state["value"]]
        return state


class Panel(ipywidgets.VBox):
    """What the panels of the workbench share: a `notice`, and a chain of futures whose errors are shown there.

    A panel asks for something and goes on: nothing of it waits, and nothing that is raised on the way is lost.
    """

    def __init__(self) -> None:
        self.notice = Notice()
        super().__init__()
        self.add_class("refine-panel")  # by which the notice's module knows whose keys it keeps

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """With the whole text: a box would cut it after 110 letters."""
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle if bundle is None else bundle | {"text/plain": repr(self)}

    @property
    def error(self) -> str:
        """What went wrong last; empty where nothing did."""
        return self.notice.error

    @error.setter
    def error(self, sentence: str) -> None:
        self.notice.error = sentence

    def told(self) -> list[str]:
        """What happens now and what went wrong, as lines of a text form."""
        return [line for line in (self.notice.status, self.error and f"error: {self.error}") if line]

    def say(self, sentence: str) -> None:
        """What happens now."""
        self.notice.status = sentence

    def after(self, begin: Callable[[], Any], *then: Callable[[Any], Any]) -> Future[Any]:
        """Begin, and pass each result on to the next function; the future of the last one's result.

        Any of them may give a future, whose result is then passed on. What one raises ends the chain: it is shown, and the
        future raises it.
        """
        following: Future[Any] = Future()

        def advance(step: Callable[[], Any], rest: Sequence[Callable[[Any], Any]]) -> None:
            try:
                result = step()
            except Exception as error:  # the future raises it
                self.say("")
                self.error = sentence(error)
                following.set_exception(error)
                return
            if isinstance(result, Future):
                result.add_done_callback(lambda finished: advance(finished.result, rest))
            elif rest:
                advance(lambda: rest[0](result), rest[1:])
            else:
                following.set_result(result)

        self.error = ""
        advance(begin, then)
        return following
