"""A field for text, with an optional list of choices beside it and the error of its owner below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ipywidgets
import traitlets

from refine_lab.text import replace_surrogates
from widgets.core.base import Widget


class Choice(NamedTuple):
    """An entry of a list: the value that it sets, what the list shows, and the heading under which it stands."""

    value: str
    words: str
    group: str


class EntryField(Widget):
    """One line of text, or several. Buttons of its panel that are pressed after an entry wait until Python has taken it.

    What is typed stays in the field, also if its owner sets `error`, which is cleared by the next entry. With `choices`,
    a list beside the text sets it, and any other text can still be typed.
    """

    value = traitlets.Unicode().tag(sync=True)
    "The text."
    label = traitlets.Unicode().tag(sync=True)
    "Description in front of the field."
    help = traitlets.Unicode().tag(sync=True)
    "The glossary's sentence about the field, shown as a tooltip."
    placeholder = traitlets.Unicode().tag(sync=True)
    "What an empty field shows."
    choices = traitlets.List().tag(sync=True)
    "Entries of the list (`Choice`); empty: there is no list."
    list_label = traitlets.Unicode("choose from a list").tag(sync=True)
    "What the list shows while the text is none of its entries."
    rows = traitlets.Int(0).tag(sync=True)
    "Height in rows of a field with several lines; 0: the field has one line."
    disabled = traitlets.Bool(False).tag(sync=True)
    "Whether the text cannot be changed on the page."

    def __init__(self, width: str = "20em", **options: Any) -> None:
        super().__init__(layout=ipywidgets.Layout(width=width, max_width="100%"), **options)
        self.on_msg(self._on_message)

    def show_choices(self, choices: Sequence[Choice]) -> None:
        """Replaces the list; the text stays."""
        self.choices = [list(choice) for choice in choices]

    def update(self) -> None:
        """Reads the choices again, where a subclass knows them."""

    @traitlets.validate("value", "error")
    def _check_text(self, proposal: Any) -> str:
        """Replaces unpaired surrogates, which messages cannot carry."""
        return replace_surrogates(proposal["value"])

    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        if content.get("list"):
            self.update()
        if isinstance(content.get("typed"), str):
            self.error = ""
            self.value = content["typed"]
            self.send({"taken": self.value})

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.label} {self.value!r}" + (f", {self.error}" if self.error else "")
