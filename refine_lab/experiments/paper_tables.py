"""Compares our scores with the paper's: mean and spread over seeds of each cell, and the signs of each difference.

A task on which the model before training is within two standard errors of random weights is at its floor: differences
have no sign there. A cell without a measurement is left empty and never counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from refine_lab.experiments.paper_intervals import difference_interval, of_seed, scores_over, shared_seeds
from refine_lab.experiments.paper_rows import FIELDS, HELD_OUT, QUESTIONS, RANDOM, ROLLOUTS, Row
from refine_lab.models.hub import resolve
from refine_lab.recipes.paper_results import MEAN, PAPER_MODELS, paper_numbers, reported_signs, table_names
from refine_lab.runs.files import read_json
from refine_lab.validation import require, unknown

PAIRS: dict[str, tuple[tuple[int, int], ...]] = {
    "table 3": ((3, 2), (3, 1), (2, 1)),
    "table 4": ((3, 2), (3, 1), (2, 1), (4, 3), (6, 4), (6, 5), (7, 6), (8, 6), (8, 7)),
    "table 5": ((3, 2), (3, 1), (2, 1), (4, 3), (5, 3), (5, 4)),
    "table 6": ((2, 1),),
    "table 7": ((4, 1), (4, 2), (4, 3)),
    "table E.1": ((3, 2), (3, 1), (2, 1)),
    "table E.2": ((2, 1), (4, 1), (4, 2), (4, 3)),
    "figure 4": ((3, 2), (3, 1), (2, 1)),
    "figure E.1": ((3, 2), (3, 1), (2, 1)),
    "figure 5": ((4, 1), (4, 2), (4, 3), (4, 5), (4, 6), (4, 7), (4, 8), (4, 9)),
    "figure E.3": ((2, 1), (3, 2), (3, 1)),
}
"""Table -> the pairs of rows (row, against) that are compared, by their numbers."""
STANDARD_ERRORS = 2.0
"""Distance between base and random weights, in standard errors, up to which a task is at its floor."""
NO_FLOOR = (HELD_OUT, ROLLOUTS)
"""Tasks without a floor, which are not scores of answers."""
MINUS = "−"


class PaperMeasure(NamedTuple):
    """A column of a table without its length; `beside` are the paper's tasks that an own measure is compared with."""

    name: str
    task: str
    metric: str = ""
    unit: str = "%"
    beside: tuple[str, ...] = ()


NEEDLES = ("niah_single_1", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
RECALL_4 = PaperMeasure("exact recall, 4 facts", "recall", "exact_recall_word-4")
RECALL_12 = PaperMeasure("exact recall, 12 facts", "recall", "exact_recall_word-12")
OWN: dict[str, tuple[PaperMeasure, ...]] = {
    "table 3": (RECALL_4._replace(beside=NEEDLES), RECALL_12._replace(beside=NEEDLES)),
    "table 4": (
        PaperMeasure("recall questions", QUESTIONS, "contains_answer", beside=("ruler_squadqa", "ruler_hotpotqa")),
    ),
    **{name: (RECALL_12._replace(beside=("longbench",)),) for name in ("table 6", "table 7", "figure 5")},
}
"""Table -> our own measures in it, for models that are too small for the paper's tasks."""


def paper_model_of(model: str) -> str:
    """Returns the paper's model of the same family: `LaCT-760M` for a LaCT, and `DeltaNet-1.3B` for every other one."""
    model_type = read_json(resolve(model) / "config.json").get("model_type", "")
    lact, deltanet = PAPER_MODELS
    return lact if "lact" in str(model_type) else deltanet


# -- cells -------------------------------------------------------------------------------------------------------------


def cells(table: str, measured: pd.DataFrame, model: str) -> pd.DataFrame:
    """Returns one line per row, measure and length of a table: the paper's number and ours.

    `measured` as from `paper_rows.measured`; `model` is one of `PAPER_MODELS`. Columns: `table`, `row` (its number),
    `label`, `methods` (its `Row`), `measure`, `task`, `length`, `unit`, `own`; `paper`; `mean`, `sd` (n - 1, over seeds),
    `by_seed` (seed -> value), `scores` (seed -> item and score of every sample, or None), `stderr` (over samples; the mean
    of the seeds'), `samples` and `different`; `floor` (`floor`, `above`, or `unknown` if random weights were not measured).
    Values are in the unit, percent for fractions; `scores` are not. A gap has `mean` NaN.
    `row` 0 is the model with random weights. Raises ConfigError for an unknown table or model.
    """
    if table not in table_names():
        raise unknown("table", table, table_names())
    require(model in PAPER_MODELS, "paper_model", model, " or ".join(map(repr, PAPER_MODELS)))
    numbers = paper_numbers()
    paper = numbers[(numbers["table"] == table) & (numbers["model"] == model)]
    rows = {number: Row(*group[[*Row._fields]].iloc[0]) for number, group in paper.groupby("row")}
    lines = []
    for measure in _measures(table, paper):
        by_row = {Row(*map(str, key)): lines for key, lines in _groups(_of_measure(measured, measure))}
        for length in (lengths := _lengths(measure, measured)):
            wanted = [each for each in lengths if each != MEAN] if length == MEAN else [length]
            ours = {row: _ours(by_row.get(row), measure, wanted) for row in (RANDOM, Row(), *rows.values())}
            values = {0: ours[RANDOM], **{number: ours[row] for number, row in rows.items()}}
            floor = _floor(measure, ours[RANDOM], ours[Row()])
            for number, each in values.items():
                facts = {
                    "table": table,
                    "row": number,
                    "label": rows.get(number, RANDOM).label,
                    "methods": rows.get(number, RANDOM),
                    "measure": measure.name,
                }
                facts |= {"task": measure.task, "length": length, "unit": measure.unit, "own": bool(measure.beside)}
                lines.append({**facts, "paper": _printed(paper, number, measure, length), **each, "floor": floor})
    return pd.DataFrame(lines)


def _measures(table: str, paper: pd.DataFrame) -> Iterator[PaperMeasure]:
    for (task, metric, unit), group in paper.groupby(["task", "metric", "unit"], sort=False):
        name = group["column"].iloc[0]
        name = name.rpartition(" ")[0] if group["length"].iloc[0] else name
        yield PaperMeasure(name, str(task), str(metric), str(unit))
    yield from OWN.get(table, ())


def _groups(lines: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Yields the lines of each row of the paper's tables with its fields."""
    groups: Any = lines.groupby([*Row._fields])
    yield from groups


def _of_measure(measured: pd.DataFrame, measure: PaperMeasure) -> pd.DataFrame:
    """Returns the lines of a measure; an empty metric is the task's main one."""
    lines = measured[measured["task"] == measure.task]
    return lines[lines["metric"] == measure.metric if measure.metric else lines["main"].astype(bool)]


def _lengths(measure: PaperMeasure, measured: pd.DataFrame) -> list[str]:
    """Returns the lengths that were measured and their mean, from short to long; only the mean for none."""
    lengths = sorted({length for length in _of_measure(measured, measure)["length"] if length}, key=int)
    by_length = measure.task in (*NEEDLES, "recall", "ruler_squadqa", "ruler_hotpotqa")
    if not lengths:
        return [MEAN if by_length else ""]
    return lengths if len(lengths) == 1 and not by_length else [*lengths, MEAN]


def _ours(lines: pd.DataFrame | None, measure: PaperMeasure, lengths: Sequence[str]) -> dict[str, Any]:
    """Returns mean and spread over seeds of a row's mean over `lengths`, all of which a seed must have."""
    scale = _scale(measure.unit)
    values, scores, errors, facts = {}, {}, [], {"samples": 0, "different": 0}
    lines = pd.DataFrame(columns=[*FIELDS]) if lines is None or not lengths else lines
    for seed in lines["seed"].unique():
        group = lines[lines["seed"] == seed].set_index("length").reindex([*lengths])
        if group["value"].notna().all():
            values[int(seed)] = scale * float(group["value"].mean())
            scores[int(seed)] = scores_over(group["scores"].tolist())
            errors.append(scale * float(np.linalg.norm(group["stderr"].to_numpy(float)) / len(lengths)))
            facts = {name: int(group[name].sum()) for name in facts}
    found = np.array([*values.values()])
    mean, sd = found.mean() if len(found) else np.nan, found.std(ddof=1) if len(found) > 1 else np.nan
    spread = {"stderr": np.mean(errors) if errors else np.nan, **facts}
    return {"mean": mean, "sd": sd, "by_seed": values, "scores": scores, **spread}


def _scale(unit: str) -> float:
    """Returns the factor from a measured value to its unit: fractions are shown in percent."""
    return 100.0 if unit.startswith("%") else 1.0


def _floor(measure: PaperMeasure, random: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Returns `floor` if base and random weights are within two standard errors of their difference, else `above`."""
    if measure.task in NO_FLOOR:
        return "above"
    stderr = np.hypot(random["stderr"], base["stderr"])
    distance = abs(random["mean"] - base["mean"])
    if np.isnan(distance + stderr):
        return "unknown"
    return "floor" if distance <= STANDARD_ERRORS * stderr else "above"


def _printed(paper: pd.DataFrame, row: int, measure: PaperMeasure, length: str) -> float:
    """Returns the paper's number for a row, measure and length; NaN if it prints none."""
    lines = paper[(paper["row"] == row) & (paper["task"] == measure.task) & (paper["metric"] == measure.metric)]
    lines = lines[lines["length"] == length]
    return float(lines["value"].iloc[0]) if len(lines) and not measure.beside else np.nan


# -- differences -------------------------------------------------------------------------------------------------------


def differences(found: pd.DataFrame, model: str) -> pd.DataFrame:
    """Returns one line per compared pair of rows, measure and length, from the `cells` of one table.

    Columns: `table`, `row`, `against`, `difference` (both labels), `measure`, `task`, `length`, `unit`; `paper` (NaN without
    numbers) and `paper_sign`, which for an own measure is the sign that the measures beside it share, or `mixed`; `mean`,
    `sd` and `seeds` of our paired differences; `low` and `high`, their 95 % interval over seeds and items, and the number
    of `items` (`paper_intervals.difference_interval`); and `sign`: `+`, `−`, `0`, or why there is none: `gap`, `floor`,
    or `floor unknown` if random weights were not measured. `verdict`: `same`, `opposite`, `zero` (one of them is 0), or
    none.
    """
    (table,) = found["table"].unique()
    lines = []
    for row, against in PAIRS[table]:
        for (measure, length), group in found.groupby(["measure", "length"], sort=False):
            by_row: dict[int, Any] = {each["row"]: each for each in group.to_dict("records")}
            one, other = by_row[row], by_row[against]
            paper = round(one["paper"] - other["paper"], 1)
            line = {"table": table, "row": row, "against": against, "difference": f"{one['label']} – {other['label']}"}
            line |= {"measure": measure, "length": length, **{name: one[name] for name in ("task", "unit", "own")}}
            values = _paired(one["by_seed"], other["by_seed"])
            interval, scale = difference_interval(one["scores"], other["scores"]), _scale(one["unit"])
            line |= {"low": scale * interval["low"], "high": scale * interval["high"], "items": interval["items"]}
            line |= {"paper": paper, "mean": values.mean() if len(values) else np.nan, "seeds": len(values)}
            line |= {"sd": values.std(ddof=1) if len(values) > 1 else np.nan, "sign": _our_sign(values, one["floor"])}
            lines.append(line)
    frame = pd.DataFrame(lines)
    printed = {each: sign_of(value) for each, value in frame["paper"].items()}
    frame["paper_sign"] = [printed[i] or _text_sign(frame.loc[i], frame, model) for i in frame.index]
    frame["verdict"] = [verdict(*pair) for pair in zip(frame["sign"], frame["paper_sign"], strict=True)]
    return frame


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> np.ndarray:
    """Returns the differences over the seeds that both have; a value of every seed is paired with each."""
    return np.array([of_seed(one, seed) - of_seed(other, seed) for seed in shared_seeds(one, other)])


def _our_sign(values: np.ndarray, floor: str) -> str:
    if not len(values):
        return "gap"
    return {"above": sign_of(float(values.mean())), "unknown": "floor unknown"}.get(floor, floor)


def sign_of(value: float) -> str:
    """Returns `+`, `−` or `0`; empty for NaN. Differences below rounding count as 0."""
    if np.isnan(value):
        return ""
    return "0" if abs(value) < 1e-9 else "+" if value > 0 else MINUS


def _text_sign(line: pd.Series, frame: pd.DataFrame, model: str) -> str:
    """Returns the sign that the paper's text reports, or for an own measure that of the paper's measures beside it."""
    pair = int(line["row"]), int(line["against"])
    if pair in (signs := reported_signs(str(line["table"]))):
        return signs[pair].replace("-", MINUS)
    own = next((each for each in OWN.get(str(line["table"]), ()) if each.name == line["measure"]), None)
    if own is None:
        return ""
    numbers = paper_numbers()
    paper = numbers[
        (numbers["table"] == line["table"]) & (numbers["model"] == model) & numbers["task"].isin(own.beside)
    ]
    paper = paper[paper["length"].isin((MEAN, ""))].pivot(index="task", columns="row", values="value")
    signs_beside = {sign_of(round(value, 1)) for value in paper[pair[0]] - paper[pair[1]]}
    return signs_beside.pop() if len(signs_beside) == 1 else "mixed"


def verdict(ours: str, paper: str) -> str:
    """Returns how two signs compare: `same`, `opposite`, `zero` if one of them is 0, or empty if one has no sign."""
    if not {ours, paper} <= {"+", MINUS, "0"}:
        return ""
    return "same" if ours == paper else "zero" if "0" in (ours, paper) else "opposite"


def summary(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Returns one line per table: how many differences have the paper's sign, a different one, or none, and why.

    `frames` are the `differences` of the tables. Lengths that the paper lacks are not counted; means are.
    """
    lines = []
    for frame in frames:
        frame = frame[frame["length"].isin((MEAN, "")) | frame["paper"].notna() | (frame["task"] == QUESTIONS)]
        counts = {name: int((frame["verdict"] == name).sum()) for name in ("same", "opposite", "zero")}
        counts |= {name: int((frame["sign"] == name).sum()) for name in ("floor", "floor unknown", "gap")}
        rest = len(frame) - sum(counts.values())
        lines.append(
            {"table": frame["table"].iloc[0], "differences": len(frame), **counts, "no single sign in the paper": rest}
        )
    return pd.DataFrame(lines)
