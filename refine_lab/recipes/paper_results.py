"""The paper's results as data: each printed number with its table, row and column, and what the text says about figures.

`paper_results.json` holds them table by table, as printed. A row is named by the methods of its phases and by the settings
that differ from the paper's defaults; a column by the task that measures it here. Figures 4, 5, E.1, E.2 and E.3 have no
printed numbers, except for two points of each curve over the number of chunks in figure 5. For these, `signs` holds the
directions that captions and text report.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from refine_lab.runs.files import read_json
from refine_lab.validation import unknown

PAPER_MODELS = ("LaCT-760M", "DeltaNet-1.3B")
"""The models of the paper's tables."""
PHASES = ("midtrain", "posttrain", "ttt")
"""Phases of training in order; a row names the method of each, or `none`."""
ROW = (*PHASES, "setting")
"""Columns that identify a row: the methods, and the settings other than the paper's, as in `rollout_length=3`."""
MEAN = "mean"
"""Length of a column that averages over lengths."""
COLUMNS = ("table", "row", "model", *ROW, "column", "task", "metric", "length", "unit", "value")


@cache
def content() -> dict[str, Any]:
    """Returns the file's content: table or figure -> `about`, `text`, `columns`, `rows`, `signs`, `examples`."""
    return read_json(Path(__file__).with_name("paper_results.json"))


def table_names() -> list[str]:
    """Returns the tables and figures that have rows and columns."""
    return [name for name, table in content().items() if "rows" in table]


def about(table: str) -> str:
    """Returns what a table or figure shows. Raises ConfigError for an unknown one."""
    if table not in content():
        raise unknown("table", table, content())
    return content()[table]["about"]


def reported(figure: str) -> str:
    """Returns what the paper's text reports about a figure; empty for a table."""
    return content()[figure].get("text", "")


@cache
def paper_numbers() -> pd.DataFrame:
    """Returns one line per cell of the paper's tables, with `COLUMNS`; the value of a cell without a number is NaN.

    `row` counts the rows of one model from 1. `task`, `metric` and `length` name what measures the column here: an empty
    metric is the task's main one; a length is a number of tokens, `mean`, or empty. The unit is `%`, `% of tokens`, `ppl`,
    `nats` or `reward`.
    """
    lines = []
    for table in table_names():
        entry, count = content()[table], dict.fromkeys(PAPER_MODELS, 0)
        for row in entry["rows"]:
            count[row["model"]] += 1
            names = {name: row.get(name, "none") for name in PHASES} | {"setting": row.get("setting", "")}
            for column, value in zip(entry["columns"], row["values"], strict=True):
                lines.append(
                    {"table": table, "row": count[row["model"]], "model": row["model"], **names}
                    | {"column": column["name"], "task": column["task"], "metric": column.get("metric", "")}
                    | {"length": str(column.get("length", "")), "unit": column.get("unit", "%")}
                    | {"value": np.nan if value is None else value}
                )
    return pd.DataFrame(lines, columns=list(COLUMNS))


def reported_signs(table: str) -> dict[tuple[int, int], str]:
    """Returns the signs that the text reports for differences without printed numbers: (row, against) -> sign."""
    return {(each["row"], each["against"]): each["sign"] for each in content()[table].get("signs", [])}


def example_rows() -> pd.DataFrame:
    """Returns table F.1: one line per rollout, with `example`, `reference`, `rollout` and its `cosine` reward."""
    rows = [
        {"example": number, "reference": example["reference"], "rollout": text, "cosine": reward}
        for number, example in enumerate(content()["table F.1"]["examples"], start=1)
        for text, reward in example["rollouts"]
    ]
    return pd.DataFrame(rows)
