"""Tables of text, which also work on a page without Python."""

from __future__ import annotations

from collections.abc import Sequence

import traitlets

from widgets.core.base import Widget
from widgets.figures.tables import Table


class TextTables(Widget):
    """Tables one below the other: `tables` has their `caption`, `columns`, `rows` and `helps`, all of them text.

    Each also has a `sentence` and `details` above and a `note` below, which may be empty, and `methods`, pairs of a method
    and what it does. `helps` are the tooltips of the columns, empty where there is none.
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
                "helps": [table.help_of(str(name)) for name in table.data],
                "rows": table.data.astype(str).to_numpy().tolist(),
                "sentence": getattr(table, "head", ""),
                "details": getattr(table, "details", ""),
                "note": table.note,
                "methods": [[label, text] for label, text in getattr(table, "methods", {}).items()],
            }
            for table in tables
            if len(table.data)
        ]
        return cls(tables=shown)

    def __repr__(self) -> str:
        return f"TextTables: {', '.join(table['caption'] for table in self.tables) or 'none'}"
