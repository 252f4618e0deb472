"""The token map: a document as coloured text, validated and packed by Python, laid out and searched by JavaScript."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import traitlets
from traitlets.utils.bunch import Bunch

from refine_lab.explore.futures import finished
from refine_lab.validation import require
from widgets.core.base import Widget, bounded, guarded
from widgets.core.packing import PACKED, pack
from widgets.parts.token_document import Alternatives, Ask, Metric, Target, TextRow, packed_document, packed_rows
from widgets.parts.token_text import TokenText, token_text

__all__ = ["Alternatives", "Metric", "Target", "TokenMap", "TokenText", "token_text"]

MOST_TOKENS = 1 << 17
PAGE_ALTERNATIVES = 1 << 14
"""Maximum number of tokens of a document whose alternatives a page without Python includes."""
PATIENCE = 60.0
"""Maximum number of seconds to wait for pending alternatives when such a page is written."""


class TokenMap(Widget):
    """A document as text, with each token's background coloured by one of the metrics.

    `targets` are marked by a frame and a diamond, and `chunk_borders` (the first tokens of chunks) by a line and the
    chunk's number, from 1. `alternatives` are a model's likely tokens in place of each token: arrays, or a function
    that is called for the tokens in view (`token_document.Ask`). Raises ValueError if lengths or positions do not fit
    the text. Clicking a token, or pressing Enter on it, sets `selected`, and calls its observers also if it was selected
    already; setting it in Python scrolls there.
    """

    page_heading = "Document"

    document = traitlets.Dict().tag(**PACKED)
    "The text, metrics and marks, packed; always set as a whole by `show`."
    metric = traitlets.Unicode().tag(sync=True)
    "Name of the metric that colours the tokens; empty without metrics."
    selected = traitlets.Int(-1).tag(sync=True)
    "The selected token, or -1."
    highlight = traitlets.List(traitlets.Int()).tag(sync=True)
    "First and last token of the highlighted text, or empty; setting it scrolls there."
    view = traitlets.Int(0).tag(sync=True)
    "The first visible token; setting it scrolls."
    height = traitlets.Int(420).tag(sync=True)
    "Maximum height of the text in pixels; a short text takes less."

    def __init__(
        self,
        text: TokenText | None = None,
        metrics: Sequence[Metric] = (),
        *,
        targets: Iterable[Target] = (),
        chunk_borders: Iterable[int] = (),
        alternatives: Alternatives | tuple[Any, Any, Any] | Ask | None = None,
    ) -> None:
        self.text, self.metrics = TokenText("", [0]), {}
        self._ask: Ask | None = None
        self._key = self._text_key = 0
        super().__init__()
        self.on_msg(self._on_message)
        self.show(text, metrics, targets=targets, chunk_borders=chunk_borders, alternatives=alternatives)

    def show(
        self,
        text: TokenText | None,
        metrics: Sequence[Metric] = (),
        *,
        targets: Iterable[Target] = (),
        chunk_borders: Iterable[int] = (),
        alternatives: Alternatives | tuple[Any, Any, Any] | Ask | None = None,
        mark: str = "sampled position",
    ) -> None:
        """Replaces the content in one message; arguments as for the class, and `mark`: what the legend calls `targets`.

        If `text` is the same `TokenText` object as before, scroll position and selection are kept; the metric is kept
        if the new metrics include its name. Raises ValueError for arguments that do not fit, and then changes nothing.
        """
        text = TokenText("", [0]) if text is None else text
        if len(text) > MOST_TOKENS:
            raise ValueError(f"a document must have at most {MOST_TOKENS:,} tokens, got {len(text):,}")
        document = packed_document(text, metrics, targets, chunk_borders, alternatives)
        with self.hold_sync():
            self._key += 1
            if text is not self.text:
                self.selected, self.highlight, self.view, self._text_key = -1, [], 0, self._key
            self.text, self.metrics = text, {metric.name: metric for metric in metrics}
            self._ask = alternatives if callable(alternatives) else None
            self.document = document | {"key": self._key, "text_key": self._text_key, "mark": mark}
            self.metric = self.metric if self.metric in self.metrics else next(iter(self.metrics), "")

    @traitlets.validate("metric")
    def _check_metric(self, proposal: Any) -> str:
        require(proposal["value"] in (self.metrics or {""}), "metric", proposal["value"], f"one of {[*self.metrics]}")
        return proposal["value"]

    _check_selected = bounded("selected", lambda self: (-1, len(self.text) - 1))

    @traitlets.validate("highlight")
    def _check_highlight(self, proposal: Any) -> list[int]:
        ends = proposal["value"]
        fits = not ends or (len(ends) == 2 and 0 <= ends[0] <= ends[1] < len(self.text))
        require(fits, "highlight", ends, f"empty, or first and last token from 0 to {len(self.text) - 1}")
        return ends

    _check_height = bounded("height", lambda self: (100, 4000))

    @traitlets.validate("view")
    def _clamp_view(self, proposal: Any) -> int:
        return min(max(proposal["value"], 0), max(len(self.text) - 1, 0))

    @guarded
    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        """Handles the page's request for alternatives to some tokens, and a click on the token that is selected."""
        if content.get("again") is True and self.selected >= 0:
            self.notify_change(Bunch(name="selected", old=-1, new=self.selected, owner=self, type="change"))
        tokens, key = content.get("ask"), self._key
        if self._ask is None or key != content.get("document") or not isinstance(tokens, list):
            return  # another document has replaced it
        tokens = [token for token in tokens if isinstance(token, int) and 0 <= token < len(self.text)]
        self._rows(self._ask, tokens).add_done_callback(lambda future: self._send_rows(tokens, key, future))

    @staticmethod
    def _rows(ask: Ask, tokens: list[int]) -> Future[Sequence[TextRow]]:
        rows = ask(tokens)
        return rows if isinstance(rows, Future) else finished(rows)

    @guarded
    def _send_rows(self, tokens: list[int], key: int, future: Future[Sequence[TextRow]]) -> None:
        rows = future.result()
        if len(rows) != len(tokens):
            raise ValueError(f"alternatives must have a row for each of {len(tokens)} tokens, got {len(rows)}")
        packed = packed_rows(rows)
        names = [name for name, value in packed.items() if isinstance(value, bytes)]
        content = {"tokens": tokens, "document": key, "width": packed["width"], "names": names}
        self.send({"alternatives": content}, [packed[name] for name in names])

    def page_state(self) -> dict[str, Any]:
        """Returns the state with the alternatives to every token, unless the document is too long."""
        state = super().page_state()
        if self._ask is None:
            return state
        packed = None
        if len(self.text) <= PAGE_ALTERNATIVES:
            packed = packed_rows(self._rows(self._ask, [*range(len(self.text))]).result(PATIENCE))
        return state | {"document": pack({**self.document, "alternatives": packed})}

    def __repr__(self) -> str:
        """Lists lengths, metrics, the highest tokens of the chosen metric and the selected token."""
        if not len(getattr(self, "text", "")):
            return "TokenMap: no tokens"
        document: Any = self.document
        marks = {"sampled positions": document["targets"], "chunk borders": document["chunk_borders"]}
        counts = {"tokens": self.text, "characters": self.text.text} | {name: x for name, x in marks.items() if x}
        lines = ["TokenMap: " + ", ".join(f"{len(items):,} {name}" for name, items in counts.items())]
        for metric in [*self.metrics.values()][:8]:
            values = metric.values[np.isfinite(metric.values)].astype(np.float64)
            span = f"mean {values.mean():.4g}, {values.min():.4g} to {values.max():.4g}" if values.size else "no values"
            mark = "  <- shown" if metric.name == self.metric else ""
            lines.append(f"  {metric.title} ({metric.unit}): {span}{mark}".replace(" ()", ""))
        if self.metric:
            metric = self.metrics[self.metric]
            values = np.abs(metric.values) if metric.diverging else metric.values
            order = np.argsort(-values, kind="stable")[:5]  # NaN comes last
            lines.append(f"highest {metric.title}:")
            lines += ["  " + self._line(int(token)) for token in order if not np.isnan(values[token])]
        if self.highlight:
            lines.append(f"highlighted: tokens {self.highlight[0]} to {self.highlight[1]}")
        if self.selected >= 0:
            lines.append("selected: " + self._line(self.selected))
        return "\n".join(lines)

    def _line(self, token: int) -> str:
        text = repr(self.text[token])
        text = text if len(text) <= 40 else text[:39] + "…"
        metrics = [*self.metrics.values()][:4]
        values = [f", {metric.title} {metric.values[token]:.4g} {metric.unit}".rstrip() for metric in metrics]
        return f"{token} {text}{''.join(values)}"
