"""Tables of text, which also work on a page without Python."""

from __future__ import annotations

from collections.abc import Sequence

import traitlets

from widgets.core.base import Widget
from widgets.core.glossary import explain
from widgets.figures.tables import Table


class TextTables(Widget):
    """Tables one below the other: `tables` has their `caption`, `columns`, `rows` and `helps`, all of them text.

    Each also has a `sentence` above and a `note` below, which may be empty. `helps` are the glossary's sentences about the
    columns, empty where it has none.
    """

    page_heading = "Tables"

    tables = traitlets.List().tag(sync=True)

    @classmethod
    def of(cls, tables: Sequence[Table]) -> TextTables:
        """Makes a widget with the tables that have rows. Their cells are shown as `str` writes them."""
        shown = [
            {
                "caption": table.caption,
                "columns": [str(name) for name in table.data],
                "helps": [explain(str(name)) for name in table.data],
                "rows": table.data.astype(str).to_numpy().tolist(),
                "sentence": getattr(table, "sentence", ""),
                "note": table.note,
            }
            for table in tables
            if len(table.data)
        ]
        return cls(tables=shown)

    def __repr__(self) -> str:
        return f"TextTables: {', '.join(table['caption'] for table in self.tables) or 'none'}"
