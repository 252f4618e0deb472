"""Validates and packs a token map's metrics, targets and alternatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refine_lab.text import replace_surrogates
from refine_lab.validation import require
from widgets.core.glossary import explain
from widgets.parts.token_text import TokenText, utf16_offsets

TextRow = Sequence[tuple[str, float]]
"""Alternatives to one token, most likely first: text and probability."""
Ask = Callable[[list[int]], "Sequence[TextRow] | Future[Sequence[TextRow]]"]
"""Tokens -> a row of alternatives for each, directly or as a future."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A value for each token and its colour scale.

    `values` [T]: in `unit`; NaN for a token without a value. `low` and `high`: ends of the scale; the defaults are 0 or
    the 1st percentile, and the 99th percentile. Values outside this range have the colour of the nearest end.
    `diverging`: two colours from 0. `log`: coloured by the logarithm. `ends`: what the colours of the lowest and of the
    highest values stand for, as the legend says.

    Raises ValueError if the values are not one-dimensional, the ends are out of order, or a logarithm is undefined.
    """

    name: str
    title: str
    unit: str
    values: Any
    diverging: bool = False
    low: float | None = None
    high: float | None = None
    log: bool = False
    ends: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float32)
        if values.ndim != 1:
            raise ValueError(f"values of {self.name!r} must be one-dimensional [T], got shape {values.shape}")
        object.__setattr__(self, "values", values)
        if not self.name:
            raise ValueError("a metric must have a name, got ''")
        if self.log and self.diverging:
            raise ValueError(f"{self.name!r} cannot be both log and diverging")
        low, high = self.scale()
        if not np.isfinite([low, high]).all() or low >= high:
            raise ValueError(f"the scale of {self.name!r} must rise from low to high, got {low} to {high}")
        if self.diverging and not low < 0 < high:
            raise ValueError(f"the scale of {self.name!r} must extend from below 0 to above 0, got {low} to {high}")
        if self.log and low <= 0:
            raise ValueError(f"the logarithm of {self.name!r} needs a scale above 0, got {low} to {high}")

    def scale(self) -> tuple[float, float]:
        """Returns the values at which the colours begin and end."""
        finite = self.values[np.isfinite(self.values)]
        first, last = (float(end) for end in np.percentile(finite, [1, 99])) if finite.size else (0.0, 1.0)
        if self.diverging:
            last = max(abs(first), abs(last)) or 1.0
            first = -last
        elif not self.log and finite.size:
            first, last = 0.0 if finite.min() >= 0 else first, 0.0 if finite.max() <= 0 and finite.min() < 0 else last
        if first == last:
            last = first * 10 if self.log and first > 0 else first + 1
        return (first if self.low is None else float(self.low)), (last if self.high is None else float(self.high))

    def packed(self) -> dict[str, Any]:
        """Returns the metric as sent to the page, with values as float32 bytes."""
        low, high = self.scale()
        texts: dict[str, Any] = {name: replace_surrogates(getattr(self, name)) for name in ("name", "title", "unit")}
        texts["help"] = explain(self.title)
        texts["ends"] = [replace_surrogates(end) for end in self.ends]
        beyond = {"below": bool((self.values < low).any()), "above": bool((self.values > high).any())}
        flags = {"diverging": bool(self.diverging), "log": bool(self.log)}
        return texts | {"values": self.values.astype("<f4").tobytes(), "low": low, "high": high} | flags | beyond


@dataclass(frozen=True)
class Target:
    """A marked token of the map, and the label of the mark."""

    token: int
    label: str = "sampled position"


class Alternatives(NamedTuple):
    """Likely alternatives to each token: `ids` and `probabilities` [T, A], and the text of each id.

    An id below 0 means no alternative.
    """

    ids: Any
    probabilities: Any
    strings: Mapping[int, str] | Sequence[str]


def packed_text(text: TokenText) -> dict[str, bytes]:
    """Returns the text in UTF-16, which can also hold lone surrogates, and each token's start in it [T + 1] uint32."""
    units = text.text.encode("utf-16-le", "surrogatepass")
    return {"text": units, "offsets": utf16_offsets(text).astype("<u4").tobytes()}


def packed_alternatives(alternatives: Alternatives | tuple[Any, Any, Any], tokens: int) -> dict[str, Any]:
    """Returns arrays of alternatives as sent to the page. Raises ValueError unless both are [T, A]."""
    ids = np.asarray(alternatives[0])
    probabilities = np.array(alternatives[1], dtype="<f4")
    if ids.ndim != 2 or len(ids) != tokens or ids.shape != probabilities.shape:
        shapes = f"{[*ids.shape]} and {[*probabilities.shape]}"
        raise ValueError(f"both arrays of alternatives must have shape [{tokens}, A], got {shapes}")
    probabilities[ids < 0] = np.nan
    distinct, index = np.unique(ids, return_inverse=True)
    strings = [str(alternatives[2][number]) if number >= 0 else "" for number in distinct.tolist()]
    bounds = np.cumsum([0, *map(len, strings)])
    return {
        "width": ids.shape[1],
        "index": index.astype("<u4").tobytes(),
        "probabilities": probabilities.tobytes(),
        **packed_text(TokenText("".join(strings), bounds)),
    }


def packed_rows(rows: Iterable[TextRow]) -> dict[str, Any]:
    """Returns rows of alternatives, which may differ in length, as sent to the page."""
    rows = list(rows)
    texts = {text: number for number, text in enumerate(dict.fromkeys(text for row in rows for text, _ in row))}
    width = max(map(len, rows), default=0)
    ids = [[texts[text] for text, _ in row] + [-1] * (width - len(row)) for row in rows]
    probabilities = [[value for _, value in row] + [np.nan] * (width - len(row)) for row in rows]
    shape = len(rows), width
    return packed_alternatives((np.reshape(ids, shape), np.reshape(probabilities, shape), [*texts]), len(rows))


def packed_document(
    text: TokenText,
    metrics: Sequence[Metric],
    targets: Iterable[Target],
    chunk_borders: Iterable[int],
    alternatives: Alternatives | tuple[Any, Any, Any] | Ask | None,
) -> dict[str, Any]:
    """Returns the content of a token map as sent to the page, with targets and chunk borders in document order.

    Raises ValueError for metrics with the same name or a wrong length, and for a nonexistent token.
    """
    tokens = len(text)
    names = [metric.name for metric in metrics]
    if len({*names}) < len(names):
        raise ValueError(f"metrics must have distinct names, got {names}")
    for metric in metrics:
        if (count := len(metric.values)) != tokens:
            raise ValueError(f"{metric.name!r} must have a value for each of {tokens} tokens, got {count}")
    marks = sorted((int(target.token), replace_surrogates(str(target.label))) for target in targets)
    borders = sorted({int(token) for token in chunk_borders})
    for kind, places in (("target", [token for token, _ in marks]), ("chunk border", borders)):
        for token in places:
            require(0 <= token < tokens, f"a {kind}", token, f"a token index from 0 to {tokens - 1}")
    packed: dict[str, Any] | None = {"lazy": True} if callable(alternatives) else None
    if alternatives is not None and not callable(alternatives):
        packed = packed_alternatives(alternatives, tokens)
    content = {"metrics": [metric.packed() for metric in metrics], "alternatives": packed}
    return content | packed_text(text) | {"targets": [list(mark) for mark in marks], "chunk_borders": borders}
