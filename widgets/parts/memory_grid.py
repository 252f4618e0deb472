"""A grid of memory parts by heads, coloured by a value of each head, from which heads are chosen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import traitlets
from jaxtyping import Float

from refine_lab.explore.attribution import Cell
from refine_lab.models.writes import MemoryPart
from refine_lab.validation import require
from widgets.core.base import Widget
from widgets.core.packing import PACKED

NAMES = {"recurrent_state": "state", "fast_weights": "fast weights", "window": "window", "keys_values": "attention"}
"""Name of a part of the memory -> its name in the grid."""


class MemoryGrid(Widget):
    """One row per part of the memory and one column per head; clicking heads, or a row's name, chooses them.

    `chosen` is empty if all heads count. With `selectable=False` the grid only shows values.
    """

    grid = traitlets.Dict().tag(**PACKED)
    "Rows, values, title and scale, packed; set by `show`."
    chosen = traitlets.List(traitlets.List(traitlets.Int())).tag(sync=True)
    "Row and head of each chosen cell; empty: all heads."
    selectable = traitlets.Bool(True).tag(sync=True)
    "Whether cells can be chosen."

    def __init__(self, *, selectable: bool = True) -> None:
        self.parts: tuple[MemoryPart, ...] = ()
        self.values: Float[np.ndarray, "M H"] = np.zeros((0, 0))
        super().__init__(selectable=selectable)

    def show(
        self,
        parts: Sequence[MemoryPart],
        values: Float[np.ndarray, "M H"],
        title: str,
        *,
        diverging: bool = False,
        of_part: Float[np.ndarray, "M"] | None = None,
        note: str = "",
    ) -> None:
        """Shows a value of each head, NaN beyond a part's heads; `of_part`: a value of each row, in a column of its own.

        `note`: a sentence below the title.
        The chosen cells are kept if the parts stay the same. Raises ValueError for values of another shape.
        """
        heads = max((part.heads for part in parts), default=0)
        require(values.shape == (len(parts), heads), "the values' shape", values.shape, f"{(len(parts), heads)}")
        most = float(np.nanmax(np.abs(values))) if values.size else 0.0
        rows = [{"layer": part.layer, "name": NAMES.get(part.name, part.name), "heads": part.heads} for part in parts]
        whole = None if of_part is None else of_part.astype("<f4").tobytes()
        with self.hold_sync():
            if tuple(parts) != self.parts:
                self.parts, self.chosen = tuple(parts), []
            self.values = values
            packed = {"rows": rows, "heads": heads, "values": values.astype("<f4").tobytes(), "of_part": whole}
            self.grid = packed | {"title": title, "note": note, "diverging": diverging, "most": most or 1.0}

    @traitlets.validate("chosen")
    def _check_chosen(self, proposal: Any) -> list[list[int]]:
        heads = [part.heads for part in self.parts]
        for cell in proposal["value"]:
            fits = len(cell) == 2 and 0 <= cell[0] < len(heads) and 0 <= cell[1] < heads[cell[0]]
            require(fits, "a chosen cell", cell, "row and head of the grid")
        return sorted({tuple(cell): cell for cell in proposal["value"]}.values())

    @property
    def cells(self) -> list[Cell] | None:
        """Returns the chosen heads, or None for all of them."""
        return [(self.parts[row].layer, self.parts[row].name, head) for row, head in self.chosen] or None

    def choose(self, cells: Collection[Cell] | None) -> None:
        """Chooses heads; None: all of them. Raises ValueError for a head that the model does not have."""
        rows = {part.key: row for row, part in enumerate(self.parts)}
        for cell in cells or ():
            require(cell[:2] in rows, "a head", cell, "one of the model's memory_parts")
        self.chosen = [[rows[layer, name], head] for layer, name, head in cells or ()]

    def __repr__(self) -> str:
        lines = [f"MemoryGrid: {self.grid.get('title', 'empty')}"]
        lines += [f"  {self.grid['note']}"] if self.grid.get("note") else []
        for part, values in zip(self.parts, self.values, strict=True):
            numbers = " ".join(f"{value:.3g}" for value in values[: part.heads][:16])
            lines.append(f"  layer {part.layer} {NAMES.get(part.name, part.name)}: {numbers}")
        return "\n".join(lines)
