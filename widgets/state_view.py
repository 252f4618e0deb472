"""The state view: every head's fast-weight state along a document, and the tokens with the strongest writes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import traitlets
from jaxtyping import Float

from refine_lab.explore.exploration import Exploration
from refine_lab.explore.states import StateSummary
from refine_lab.validation import require
from widgets.core.base import Widget, bounded
from widgets.core.glossary import explain
from widgets.core.packing import PACKED
from widgets.figures.tables import visible

MEASURES = {
    "norm": ("norms", "Norm of the state", "Frobenius"),
    "rank": ("effective_ranks", "Effective rank of the state", "from its singular values"),
    "change": ("changes", "Change since the previous position", "relative to the norm of the state"),
}
"""Name of a measure -> field of `StateSummary`, title, unit."""
POSITIONS = 64
"""Maximum number of positions of a document at which states are computed."""
STRONGEST = 12
"""Number of tokens listed with the strongest writes in a head, or with the largest long-short differences."""
BARS = {"writes": "Write strength", "long_short": "Long-short difference (nats)"}
"""What the bars below the strips show of every token -> title."""


class StateView(Widget):
    """Norm, effective rank and change of the state of every layer and head along a document, and the strongest writes.

    `summary`: of `explore.Session.states`; `text_of`: a function from a token's index to its text. A row is a head of a
    state matrix, a column a position of the document. The bars below show the write strength of each token in the
    selected row, or how much its prediction depends on what the state holds (`refine_lab.explore.reading.long_short`).
    """

    page_heading = "States along the document"

    states = traitlets.Dict().tag(**PACKED)
    "Rows, positions, the three measures and the write strengths, packed; set by `show`."
    measure = traitlets.Enum([*MEASURES], "norm").tag(sync=True)
    "The measure that colours the strips."
    bars = traitlets.Enum([*BARS], "writes").tag(sync=True)
    "What the bars below show; `long_short` is offered for a document that has it."
    row = traitlets.Int(0).tag(sync=True)
    "The selected row."
    place = traitlets.Int(-1).tag(sync=True)
    "The selected token of the document, or -1."

    def __init__(self, summary: StateSummary | None = None, text_of: Callable[[int], str] = str) -> None:
        self.summary: StateSummary | None = None
        self.shown: Future[Any] | None = None
        super().__init__()
        if summary is not None:
            self.show(summary, text_of)

    def follow(self, exploration: Exploration, positions: int = POSITIONS) -> Future[Any]:
        """Requests and shows the states of an exploration's document; the future, also in `shown`, then completes.

        Raises ValueError if no document has been read, and for no positions.
        """
        require(positions >= 1, "positions", positions, "at least 1")
        ids = exploration._known.token_ids
        places = np.unique(np.linspace(0, len(ids) - 1, min(positions, len(ids))).astype(int)).tolist()
        self.status = f"Computing the states after {len(places)} of {len(ids):,} tokens…"

        shown = self.shown = Future()

        def done(future: Future[StateSummary]) -> None:
            try:
                self.show(future.result(), lambda token: str(exploration.tokenizer.decode([int(ids[token])])))
                self.error, self.status = "", ""
                shown.set_result(None)
            except Exception as error:  # displayed, and raised by the future
                self.error, self.status = str(error), ""
                shown.set_exception(error)

        states = exploration.worker.submit("states", model=exploration.model, token_ids=ids, positions=places)
        states.add_done_callback(done)
        return shown

    def show(self, summary: StateSummary, text_of: Callable[[int], str] = str) -> None:
        """Shows the states of another document or model."""
        finite = np.isfinite(summary.norms).any(axis=-1)  # [matrices, heads]
        rows = [
            {"layer": summary.layers[m], "name": summary.names[m], "head": h, **self._writes(summary, m, h, text_of)}
            for m, h in np.argwhere(finite).tolist()
        ]
        measures = []
        for name, (field, title, unit) in MEASURES.items():
            values = getattr(summary, field)[finite].astype("<f4")
            facts = {"name": name, "title": title, "unit": unit, "help": explain(title)}
            measures.append(facts | {"values": values.tobytes()})
        writes = np.nan_to_num(summary.write_strengths).astype("<f4")
        with self.hold_sync():
            self.summary, self.row, self.place = summary, 0, -1
            if summary.long_short is None:
                self.bars = "writes"
            _, heads, tokens = writes.shape
            places = summary.positions.astype("<u4").tobytes()
            packed = {"rows": rows, "places": places, "measures": measures, "writes": writes.tobytes()}
            packed["bars"] = [{"name": name, "title": title, "help": explain(title)} for name, title in BARS.items()]
            self.states = packed | {"tokens": tokens, "heads": heads} | self._long_short(summary, text_of)

    _check_row = bounded("row", lambda self: (0, max(len(self.states.get("rows", [])) - 1, 0)))

    @staticmethod
    def _writes(summary: StateSummary, matrix: int, head: int, text_of: Callable[[int], str]) -> dict[str, Any]:
        """Returns the row's index in the write strengths, or -1 if its layer has none, and its strongest tokens."""
        layer = summary.layers[matrix]
        if layer not in summary.write_layers or head >= summary.write_strengths.shape[1]:
            return {"writes": -1, "strongest": []}
        number = summary.write_layers.index(layer)
        strongest = _largest(summary.write_strengths[number, head], text_of)
        return {"writes": number * summary.write_strengths.shape[1] + head, "strongest": strongest}

    @staticmethod
    def _long_short(summary: StateSummary, text_of: Callable[[int], str]) -> dict[str, Any]:
        """Returns the long-short difference of every token, and the tokens with the largest, if the summary has it."""
        if summary.long_short is None:
            return {}
        values = np.nan_to_num(summary.long_short).astype("<f4")
        return {"long_short": values.tobytes(), "largest": _largest(values, text_of)}

    def __repr__(self) -> str:
        """Lists per row the norm, effective rank and change at the last position, and the strongest writes."""
        if self.summary is None:
            return self.status or "StateView: no states"
        rows, places = self.states["rows"], self.summary.positions
        lines = [f"StateView: {len(rows)} heads at {len(places)} positions, the last after token {places[-1]}"]
        measures = self.states["measures"]
        values = [np.frombuffer(each["values"], "<f4").reshape(len(rows), -1)[:, -1] for each in measures]
        for row, norm, rank, change in zip(rows[:16], *values, strict=False):
            numbers = f"norm {norm:.3f}, rank {rank:.1f}, change {change:.2f}"
            writes = " ".join(each["text"] for each in row["strongest"][:4])
            lines.append(
                f"  layer {row['layer']} {row['name']} head {row['head']}: {numbers}; strongest writes at {writes}"
            )
        return "\n".join(lines + ([f"  … {len(rows) - 16} more"] if len(rows) > 16 else []))


def _largest(values: Float[np.ndarray, "T"], text_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """Returns the tokens with the largest values, in descending order."""
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:STRONGEST].tolist()
    return [{"token": i, "text": visible(text_of(i)), "strength": float(values[i])} for i in order]
