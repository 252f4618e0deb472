"""The most likely tokens of two models in place of the selected token, side by side, with what changed marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import traitlets

from refine_lab.explore.side_by_side import ReadingPair, likely_tokens, ranks_elsewhere
from widgets.core.base import Widget, bounded
from widgets.core.packing import PACKED
from widgets.figures.tables import visible


class LikelyTokens(Widget):
    """The most likely tokens of A and B in place of a token, with log p and rank of the reference under both.

    The page has the tokens of the whole document, so that it needs no Python to show another one.
    """

    document = traitlets.Dict().tag(**PACKED)
    "The likely tokens of every token under both models, packed; empty without a document."
    names = traitlets.List(traitlets.Unicode(), ["A", "B"]).tag(sync=True)
    "The names of both models."
    selected = traitlets.Int(-1).tag(sync=True)
    "The token of the document whose alternatives are shown, or -1."

    def __init__(self) -> None:
        self.pair: ReadingPair | None = None
        self._string: Callable[[Sequence[int]], str] = str
        super().__init__()

    def show(self, pair: ReadingPair | None, string: Callable[[Sequence[int]], str], names: Sequence[str]) -> None:
        """Shows another document; `string` maps one token id, in a list, to its text. None empties the view."""
        self.pair, self._string = pair, string
        with self.hold_sync():
            self.selected = -1
            self.names = [*names]
            self.document = {} if pair is None else _packed(pair, string)

    _check_selected = bounded("selected", lambda self: (-1, len(self.pair.token_ids) - 1 if self.pair else -1))

    def __repr__(self) -> str:
        """Lists the likely tokens of both models as a table."""
        pair, token = self.pair, self.selected
        if pair is None or token < 1:
            return "LikelyTokens: no token is selected"
        table = likely_tokens(pair, token)
        for name in ("a", "b"):
            table[f"token_{name}"] = [repr(self._string([number])) for number in table[f"id_{name}"]]
        table = table[["rank", "token_a", "p_a", "elsewhere_a", "token_b", "p_b", "elsewhere_b"]]
        table.columns = ["rank", "A", "p(A)", "rank under B", "B", "p(B)", "rank under A"]
        facts = [
            f"log p {reading.logprobs[token]:.3f}, rank {reading.ranks[token]} under {name}"
            for name, reading in (("A", pair.a), ("B", pair.b))
        ]
        reference = repr(self._string([int(pair.token_ids[token])]))
        lines = [f"token {token}, reference {reference}: {'; '.join(facts)}"]
        return "\n".join([*lines, table.to_string(index=False, float_format="{:.4f}".format)])


def _packed(pair: ReadingPair, string: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Returns arrays over all tokens, with each distinct token id replaced by its index in `strings`."""
    a, b = pair.a.alternatives, pair.b.alternatives
    distinct, index = np.unique(np.concatenate([pair.token_ids, a.ravel(), b.ravel()]), return_inverse=True)
    tokens, of_a, of_b = np.split(index.astype("<u4"), [len(pair.token_ids), len(pair.token_ids) + a.size])
    sides = {}
    for name, reading, own, other, ids in (("a", pair.a, a, b, of_a), ("b", pair.b, b, a, of_b)):
        sides[name] = {
            "ids": ids.tobytes(),
            "probabilities": reading.probabilities.astype("<f4").tobytes(),
            "elsewhere": ranks_elsewhere(own, other).tobytes(),
            "logprobs": reading.logprobs.astype("<f4").tobytes(),
            "ranks": reading.ranks.astype("<u4").tobytes(),
        }
    strings = [visible(string([number])) for number in distinct.tolist()]
    return {"tokens": tokens.tobytes(), "strings": strings, "width": a.shape[1], **sides}
