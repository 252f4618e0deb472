"""Cells of the paper's tables for which we have no measurement, and the commands that fill them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd

from refine_lab.experiments.paper_rows import QUESTIONS, Row
from refine_lab.experiments.paper_runs import PaperPlan, chain_rows
from refine_lab.experiments.paper_tables import NO_FLOOR

GROUPS = {"niah": "niah", "ruler": "ruler_qa", "longbench": "longbench", "recall": "recall"}
"""Beginning of a task's name -> the group that an evaluation measures; other tasks are those of table E.1."""
WITHOUT_FILES = ("niah", "recall")
"""Groups that need no files."""
ABLATED = {"reward": "reward", "selection": "selection", "rollout_length": "k", "num_chunks": "c"}
"""Setting -> the ablation that varies it (`refine_lab.recipes.ablations`)."""
FILES = "FOLDER"
"""Stands for the folder with the files of the benchmarks in a command."""


def gaps(found: pd.DataFrame, missing: pd.DataFrame, plan: PaperPlan, output: str | None = None) -> pd.DataFrame:
    """Returns one line per group of measures that some rows of a table lack: `table`, `measures`, `rows`, and `how`.

    `found` are the `cells` of one table, `missing` the tasks that could not run (`paper_rows.measured`). `how` has the
    command that produces the cells: that of the notebook with the settings of `plan` and its folder `output`, and with the
    rows, ablations and tasks that are missing. The reason why a task could not run comes before the command.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    table = str(found["table"].iloc[0])
    for measure, group in found[found["row"] > 0].groupby("measure", sort=False):
        group = group[group["length"] == group["length"].iloc[-1]]
        empty = group[group["mean"].isna()]
        if len(empty):
            rows = "all" if len(empty) == len(group) else ", ".join(empty["label"])
            how = _how(str(group["task"].iloc[0]), [*empty["methods"]], missing, plan, output)
            lines.setdefault((rows, how), []).append(str(measure))
    table_lines = [
        {"table": table, "measures": ", ".join(measures), "rows": rows, "how": how}
        for (rows, how), measures in lines.items()
    ]
    return pd.DataFrame(table_lines, columns=["table", "measures", "rows", "how"])


def _how(task: str, empty: Sequence[Row], missing: pd.DataFrame, plan: PaperPlan, output: str | None) -> str:
    """Returns why a task could not run, if it was tried, and the command that fills its empty cells."""
    settings = [part for row in empty for part in row.setting.split(", ") if part and not part.startswith("ttt.")]
    varied = [ABLATED[setting.partition("=")[0]] for setting in settings]
    needed: dict[str, Any] = {"chain": [*plan.chain, *map(_number, empty)], "ablations": [*plan.ablations, *varied]}
    reason = ""
    if task not in (QUESTIONS, *NO_FLOOR):
        group = next((name for start, name in GROUPS.items() if task.startswith(start)), "short")
        needed["tasks"] = [*plan.tasks, group]
        needed |= {} if group in WITHOUT_FILES or plan.data else {"data": FILES}
        if reasons := sorted({*missing.loc[missing["task"].str.startswith(task), "reason"]}):
            reason = f"The task could not run: {reasons[0]}. "
    return f"{reason}`{command(plan, output, **needed)}`"


def _number(row: Row) -> int:
    """Returns the row of table 4 whose chain trains the models that a row needs."""
    trained = row._replace(setting="") if row.posttrain != "none" else Row(row.midtrain)
    return chain_rows().index(trained) + 1


def command(plan: PaperPlan, output: str | None = None, **changes: Any) -> str:
    """Returns the command that executes the notebook with the settings of a plan, and with `changes` to it.

    Settings that are the defaults of a plan are left out; a list is written with commas, in its order and without repeats.
    The numbers in `chain` are sorted.
    """
    values: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(plan)} | changes
    values["chain"] = sorted(values["chain"])
    defaults = PaperPlan()
    words = ["papermill", "notebooks/paper.ipynb", "out.ipynb", "-p", "launch", "true"]
    words += ["-p", "output", output] if output else []
    for name, value in values.items():
        text, usual = (_text(each) for each in (value, getattr(defaults, name)))
        words += ["-p", name, text] if text != usual else []
    return shlex.join(words)


def _text(value: Any) -> str:
    """Formats a value as a parameter of the notebook."""
    listed: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
    return ",".join(dict.fromkeys(map(str, listed)))
