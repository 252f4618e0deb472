"""The token map: a document as coloured text, validated and packed by Python, laid out and searched by JavaScript."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import traitlets

from widgets.core.base import Widget, bounded, guarded
from widgets.core.packing import PACKED, pack
from widgets.parts.token_document import (
    Alternatives,
    Ask,
    Metric,
    Row,
    Target,
    packed_alternatives,
    packed_marks,
    packed_rows,
    packed_text,
)
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
    the text. Clicking a token, or pressing Enter on it, sets `selected`; setting it in Python scrolls there.
    """

    document = traitlets.Dict().tag(**PACKED)
    "The text, metrics and marks, packed; always set as a whole by `show`."
    metric = traitlets.Unicode().tag(sync=True)
    "Name of the metric that colours the tokens; empty without metrics."
    selected = traitlets.Int(-1).tag(sync=True)
    "The selected token, or -1."
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
    ) -> None:
        """Replaces the content in one message; arguments as for the class.

        If `text` is the same `TokenText` object as before, scroll position and selection are kept; the metric is kept
        if the new metrics include its name. Raises ValueError for arguments that do not fit, and then changes nothing.
        """
        text = TokenText("", [0]) if text is None else text
        tokens = len(text)
        if tokens > MOST_TOKENS:
            raise ValueError(f"a document must have at most {MOST_TOKENS:,} tokens, got {tokens:,}")
        named = {metric.name: metric for metric in metrics}
        if len(named) < len(metrics):
            raise ValueError(f"metrics must differ in name, got {[metric.name for metric in metrics]}")
        for metric in metrics:
            if len(metric.values) != tokens:
                raise ValueError(
                    f"{metric.name!r} must have a value for each of {tokens} tokens, got {len(metric.values)}"
                )
        ask = alternatives if callable(alternatives) else None
        packed = None if alternatives is None else {"lazy": True}
        if alternatives is not None and not callable(alternatives):
            packed = packed_alternatives(alternatives, tokens)
        marks = packed_marks(targets, chunk_borders, tokens)

        self._key += 1
        self._text_key = self._text_key if text is self.text else self._key
        document: dict[str, Any] = {"key": self._key, "text_key": self._text_key, **packed_text(text), **marks}
        document |= {"metrics": [metric.packed() for metric in metrics], "alternatives": packed}
        with self.hold_sync():
            if text is not self.text:
                self.selected = -1
                self.view = 0
            self.text, self.metrics, self._ask = text, named, ask
            self.document = document
            self.metric = self.metric if self.metric in named else next(iter(named), "")

    @traitlets.validate("metric")
    def _known_metric(self, proposal: Any) -> str:
        if proposal["value"] not in (self.metrics or {"": None}):
            raise ValueError(f"metric must be one of {list(self.metrics)}, got {proposal['value']!r}")
        return proposal["value"]

    _check_selected = bounded("selected", lambda self: (-1, len(self.text) - 1))
    _check_height = bounded("height", lambda self: (100, 4000))

    @traitlets.validate("view")
    def _visible(self, proposal: Any) -> int:
        return min(max(proposal["value"], 0), max(len(self.text) - 1, 0))

    @guarded
    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        """Handles the page's request for alternatives to some tokens of a document."""
        tokens, key = content.get("ask"), self._key
        if self._ask is None or key != content.get("document") or not isinstance(tokens, list):
            return  # the document has been replaced since
        tokens = [token for token in tokens if isinstance(token, int) and 0 <= token < len(self.text)]
        answer = self._ask(tokens)
        if isinstance(answer, Future):
            answer.add_done_callback(lambda future: self._on_future(tokens, key, future))
        else:
            self._answer(tokens, key, answer)

    @guarded
    def _on_future(self, tokens: list[int], key: int, future: Future[Sequence[Row]]) -> None:
        self._answer(tokens, key, future.result())

    def _answer(self, tokens: list[int], key: int, rows: Sequence[Row]) -> None:
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
            rows = self._ask(list(range(len(self.text))))
            packed = packed_rows(rows.result(PATIENCE) if isinstance(rows, Future) else rows)
        return state | {"document": pack({**self.document, "alternatives": packed})}

    def __repr__(self) -> str:
        """Lists lengths, metrics, the highest tokens of the chosen metric and the selected token."""
        if not len(getattr(self, "text", "")):
            return "TokenMap: no tokens"
        marks = [
            f"{len(found):,} {words}"
            for name, words in (("targets", "sampled positions"), ("chunk_borders", "chunk borders"))
            if (found := self.document[name])
        ]
        lines = [", ".join([f"TokenMap: {len(self.text):,} tokens", f"{len(self.text.text):,} characters", *marks])]
        for metric in [*self.metrics.values()][:8]:
            values = metric.values[np.isfinite(metric.values)].astype(np.float64)
            span = f"mean {values.mean():.4g}, {values.min():.4g} to {values.max():.4g}" if values.size else "no values"
            lines.append(
                f"  {metric.title} ({metric.unit}): {span}".replace(" ()", "")
                + ("  <- shown" if metric.name == self.metric else "")
            )
        if self.metric:
            lines.append(f"highest {self.metrics[self.metric].title}:")
            lines += ["  " + self._line(token) for token in self._highest(5)]
        if self.selected >= 0:
            lines.append("selected: " + self._line(self.selected))
        return "\n".join(lines)

    def _highest(self, count: int) -> list[int]:
        metric = self.metrics[self.metric]
        values = np.abs(metric.values) if metric.diverging else metric.values
        order = np.argsort(-values, kind="stable")[:count]  # NaN comes last
        return [int(token) for token in order if not np.isnan(values[token])]

    def _line(self, token: int) -> str:
        shown = repr(self.text[token])
        shown = shown if len(shown) <= 40 else shown[:39] + "…"
        values = [
            f"{metric.title} {metric.values[token]:.4g} {metric.unit}".rstrip() for metric in self.metrics.values()
        ]
        return f"{token} {shown}" + "".join(f", {value}" for value in values[:4])
