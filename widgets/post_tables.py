"""Tables of post-training: the ways side by side, what one adds to another, and questions with every way's answer."""

from __future__ import annotations

import math

import pandas as pd

from refine_lab.statistics import by_way, paired_difference
from widgets.series import KNOWN_ARMS, arm_styles
from widgets.tables import Table, visible

MEASURES = {"recall": "recall (%)", "exact_match": "exact match (%)", "f1": "F1 (%)"}
COMPARED = (("nested_refine", "sft"), ("nested_refine", "nested_sft"), ("nested_sft", "sft"))
"""Pairs of ways whose difference is shown, where both were run."""


def ways_table(results: pd.DataFrame) -> Table:
    """Mean ± standard deviation over seeds of every measure, a row a way and number of updates.

    `results`: a row a way and seed, with `way`, `seed`, `updates` and the measures as shares. Raises ValueError for no rows.
    """
    _require("ways_table", results)
    measured = [name for name in MEASURES if name in results]
    rows = []
    for row in by_way(results, measured, ("way", "updates")).to_dict("records"):
        shown = {MEASURES[name]: _percent(row[name], row[f"{name}_std"]) for name in measured}
        rows.append({"way": _label(str(row["way"])), "updates": row["updates"], "runs": row["seeds"], **shown})
    return Table(pd.DataFrame(rows), "Test questions: mean ± standard deviation over seeds")


def differences_table(results: pd.DataFrame) -> Table:
    """What one way has more than another, in points, mean over seeds with its 95 % interval (Student's t, paired).

    `results` as for `ways_table`. Raises ValueError where no two ways can be compared.
    """
    _require("differences_table", results)
    there, rows = set(results["way"]), []
    for way, against in COMPARED:
        if {way, against} <= there:
            row: dict[str, object] = {"difference": f"{_label(way)} − {_label(against)}"}
            for name in (name for name in MEASURES if name in results):
                found = paired_difference(results, way, against, name)
                row |= {"seeds": found["pairs"], MEASURES[name].replace("%", "points"): _interval(found)}
            rows.append(row)
    if not rows:
        raise ValueError("figure differences_table has no data: it compares two ways of post-training")
    return Table(pd.DataFrame(rows), "Paired differences over seeds, with 95 % intervals")


def questions_table(questions: pd.DataFrame) -> Table:
    """`posttraining.side_by_side` as a table. Raises ValueError for no rows."""
    _require("questions_table", questions)
    shown = questions.map(lambda text: visible(str(text))).rename(columns=_label)
    return Table(shown, "Test questions and answers, first seed", monospace=[str(name) for name in shown])


def _label(way: str) -> str:
    bare = way.removesuffix("_release")
    label = arm_styles([bare])[bare].label if bare in KNOWN_ARMS else way
    return label + (", one inner update" if bare != way else "")


def _percent(mean: float, spread: float) -> str:
    return f"{100 * mean:.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def _interval(found: dict[str, float]) -> str:
    mean, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    return f"{mean:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def _require(name: str, frame: pd.DataFrame) -> None:
    if frame.empty:
        raise ValueError(f"figure {name} has no data: there are no rows")
