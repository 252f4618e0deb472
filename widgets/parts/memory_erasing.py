"""The part of the memory view that marks tokens and erases their writes, and as many random ones as a control."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from refine_lab.explore.attribution import Cell, WriteAttribution
from refine_lab.explore.erasing import Erasure
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.futures import ending, then
from refine_lab.explore.targets import Target
from refine_lab.validation import path_of, require
from widgets.parts.cancelling_panel import CancellingPanel
from widgets.parts.memory_grid import MemoryGrid
from widgets.parts.memory_metrics import heads_named, listed, tokens_in
from widgets.parts.token_text import TokenText

NEIGHBOURS = 1
"""Number of tokens on each side of the strongest write that are marked with it."""


class ErasingPanel(CancellingPanel):
    """Marks and erases writes; a subclass has the document, the attribution and the views, and shows the result."""

    exploration: Exploration
    target: Target | None
    attribution: WriteAttribution | None
    token_map: Any
    grid: MemoryGrid
    fields: Mapping[str, Any]
    buttons: Mapping[str, Any]
    _text: TokenText
    _version: str | None
    "Version of the weights whose effects are shown."

    def __init__(self) -> None:
        self.erasures: list[Erasure] = []
        "The erasures that `undo` goes back through; the last one is shown."
        self.control: Erasure | None = None
        "The document without as many random other writes, beside the last erasure."
        self._erasing_now: dict[str, object] = {}
        "The pending request of each button that erases."
        self._draws = 0
        super().__init__()

    def _show(self) -> None:
        raise NotImplementedError

    @property
    def _explained(self) -> WriteAttribution:
        if self.attribution is None:
            raise ValueError("no prediction is explained yet: click a token, or press Explain the answer")
        return self.attribution

    def _submit(self, method: str, **arguments: Any) -> Future[Any]:
        raise NotImplementedError

    def mark(self, tokens: Collection[int]) -> None:
        """Marks tokens to be erased. Raises ValueError for a token outside the document."""
        outside = [token for token in tokens if not 0 <= token < len(self._text)]
        require(not outside, "a token to erase", outside[:1], f"from 0 to {len(self._text) - 1}")
        self.fields["erased"].value = listed(tokens)

    def mark_strongest(self) -> None:
        """Marks the write with the largest effect in the chosen heads, and its neighbours."""
        (top,) = self._explained.top(1, self.grid.cells)
        last = len(self._text) - 1
        self.mark([*range(max(top - NEIGHBOURS, 0), min(top + NEIGHBOURS, last) + 1)])
        self.token_map.highlight = [top, top]

    def mark_highlighted(self) -> None:
        """Adds the tokens that are highlighted in the document to the marked ones. Raises ValueError if none is."""
        highlight = self.token_map.highlight
        require(len(highlight) == 2, "the highlighted text", "none", "some tokens: drag over them in the document")
        self.mark({*self._marked(), *range(highlight[0], highlight[1] + 1)})

    def erase(self) -> Future[Any]:
        """Predicts again without the writes of the marked tokens, in the chosen heads; shows both side by side."""

        def wanted() -> tuple[tuple[int, ...], Collection[Cell] | None]:
            erased = tokens_in(self.fields["erased"].value, len(self._text))
            require(len(erased) > 0, "the tokens to erase", "none", "at least one: mark tokens, or enter 646-648, 805")
            return erased, self.grid.cells

        def show(erasure: Erasure) -> None:
            self.erasures.append(erasure)
            self.control = None

        return self._erasing("erase", wanted, show)

    def erase_random(self) -> Future[Any]:
        """Predicts again without as many other writes as are erased, drawn at random, as a control of the erasure.

        The tokens are drawn among those up to the explained position that are not erased, in the same heads; each call
        draws others. The future raises ValueError while nothing is erased, and if too few other tokens are left.
        """
        asked = self.erasures[-1] if self.erasures else None

        def wanted() -> tuple[tuple[int, ...], Collection[Cell] | None]:
            if asked is None:
                raise ValueError("nothing is erased yet: mark tokens, and press Erase; then compare with random tokens")
            others = np.setdiff1d(np.arange(self._explained.target.position + 1), asked.erased)
            count = len(asked.erased)
            require(count <= len(others), "the number of erased tokens", count, f"at most {len(others)} for a control")
            drawn = np.random.default_rng(self._draws).choice(others, count, replace=False)
            self._draws += 1
            return tuple(sorted(drawn.tolist())), asked.cells

        def show(erasure: Erasure) -> None:
            if self.erasures and self.erasures[-1] is asked:
                self.control = erasure

        return self._erasing("random", wanted, show)

    def _erasing(
        self,
        button: str,
        wanted: Callable[[], tuple[tuple[int, ...], Collection[Cell] | None]],
        show: Callable[[Erasure], None],
    ) -> Future[Any]:
        """Requests an erasure and shows it, unless another prediction is explained by then; the button says so meanwhile."""
        exploration, pressed, token = self.exploration, self.buttons[button], object()
        self.report(f"Reading on without the writes in {heads_named(self.grid.cells)}…")

        def ask() -> Future[tuple[Target, Erasure]]:
            (erased, cells), target = wanted(), self._explained.target
            self._erasing_now[button], pressed.icon = token, "spinner"
            asked = self._submit("erase", erased=erased, target=target, cells=cells, version=self._version)
            return then(lambda erasure: (target, erasure), asked)

        def finish(found: tuple[Target, Erasure]) -> None:
            current = self._erasing_now.get(button) is token and exploration is self.exploration
            if current and found[0] == self.target:
                show(found[1])
                self._show()
                self.report("")

        def end(_: Any) -> None:
            if self._erasing_now.get(button) is token:
                del self._erasing_now[button]
                pressed.icon = ""

        return ending(self.after(ask, finish), end)

    def undo(self) -> None:
        """Goes back to the erasure before the last one, or to none; while an erasure is pending, takes that one back.

        Raises ValueError if nothing is erased.
        """
        if "erase" not in self._erasing_now:
            require(len(self.erasures) > 0, "the number of erasures", 0, "at least 1")
            self.erasures.pop()
            self.control = None
        self._end_erasing()
        if self.erasures:
            self.fields["erased"].value = listed(self.erasures[-1].erased)
            self.grid.choose(self.erasures[-1].cells)
        self._show()

    def restore(self) -> None:
        """Shows the model with all writes, and removes the marks; an erasure that is pending is not shown."""
        self._forget_erasures()
        self.fields["erased"].value = ""
        self._show()

    def save_state(self, path: Path | str | None = None) -> Future[str]:
        """Writes the state at the explained position for `State.load`, without what is erased; None: to the field's path.

        The future returns the path. It raises ValueError for an existing file.
        """
        began = self._cancellations

        def ask() -> Future[str]:
            position = self._explained.target.position
            file = path_of("the file of a state", path or self.fields["path"].value).resolve()
            edit = self.erasures[-1] if self.erasures else None
            erased = {} if edit is None else {"erased": edit.erased, "cells": edit.cells}
            asked = self._submit("save_state", position=position, path=str(file), version=self._version, **erased)
            asked.add_done_callback(late)
            return asked

        def late(asked: Future[str]) -> None:
            if began != self._cancellations and asked.exception() is None and asked.result() is not None:
                self.report(f"The state had already been saved when you cancelled: {asked.result()}.")

        def show(path: str) -> str:
            kind = "edited state" if self.erasures else "state with all writes"
            self.report(f"The {kind} is saved: State.load({path!r}) reads it.")
            return path

        return self.after(ask, show)

    def _forget_erasures(self) -> None:
        self.erasures.clear()
        self.control = None
        self._end_erasing()

    def _end_erasing(self) -> None:
        """Shows nothing of the erasures that are pending."""
        for button in [*self._erasing_now]:
            del self._erasing_now[button]
            self.buttons[button].icon = ""
            self.report("")

    def _marked(self) -> tuple[int, ...]:
        """Returns the marked tokens; none while the field cannot be read."""
        try:
            return tokens_in(self.fields["erased"].value, len(self._text))
        except ValueError:
            return ()
