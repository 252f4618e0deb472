"""The table of the losses of two models on one document, with the differences and their intervals."""

from __future__ import annotations

import math

import pandas as pd

from refine_lab.explore.side_by_side import ReadingPair
from refine_lab.statistics.means import CONFIDENCE
from refine_lab.statistics.rest_change import signed
from widgets.figures.tables import Table

LABELS = {"loss": "NTP loss (nats per token)", "perplexity": "perplexity", "LongPPL": "LongPPL"}


def measure_table(pair: ReadingPair, heading: str) -> Table:
    """Returns `ReadingPair.measures` as a table of text; its caption says which model predicts the document better.

    `heading` names the models.
    """
    rows = []
    for row in pair.measures().to_dict("records"):
        shown = signed if row["measure"] == "loss" else _ratio
        digits = 4 if row["measure"] == "loss" else 2
        ends = [shown(row[name]) for name in ("low", "high")]
        interval = "undetermined" if math.isnan(row["low"]) else " to ".join(ends)
        rows.append(
            {
                "measure": LABELS[row["measure"]],
                "A": f"{row['A']:.{digits}f}",
                "B": f"{row['B']:.{digits}f}",
                "B against A": shown(row["difference"]),
                f"{CONFIDENCE:.0%} interval": interval,
                "tokens": f"{row['tokens']:,}",
            }
        )
    note = f"{pair.details()} {pair.key_details()} Perplexities are compared by their ratio, B divided by A."
    return Table(pd.DataFrame(rows), f"{pair.loss.verdict}. {heading}", note=note)


def _ratio(value: float) -> str:
    return f"× {value:.3f}"
