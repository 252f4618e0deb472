"""Differences from a reference as a table, under one sentence that says what they show and what they do not show."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from refine_lab.data.tasks.items import few_items
from refine_lab.experiments.reference import (
    FEWEST_SEEDS,
    default_reference,
    differences_from,
    not_compared,
    scores_by_item,
    scores_by_seed,
)
from refine_lab.validation import unknown
from widgets.figures.method_tables import ITEMS, format_p, format_value, heading, measure_of
from widgets.figures.plotting import require_data
from widgets.figures.series import method_styles
from widgets.figures.tables import Table

ADAPTED = ("loss_before", "loss_after", "entropy_before", "entropy_after")
"""Measures of the text to which a model was adapted."""
SENTENCE = "font-weight: 600; line-height: 1.4; max-width: 72em"
"""Style of the sentence."""
FEW_SEEDS = 3
"""Number of seeds below which a conclusion says that the variation between seeds is known only roughly."""


class Conclusion(Table):
    """A table of differences from a reference with its `sentence` above."""

    def __init__(self, data: pd.DataFrame, caption: str, *, sentence: str, note: str = "") -> None:
        super().__init__(data, caption, note=note)
        self.sentence = sentence

    def __repr__(self) -> str:
        return f"{self.sentence}\n{super().__repr__()}"

    def _repr_html_(self) -> str:
        sentence = f"<p style='{SENTENCE}'>{html.escape(self.sentence)}</p>"
        return sentence + super()._repr_html_()


def conclusion(
    answers: pd.DataFrame,
    measures: str | Sequence[str] = "contains_answer",
    *,
    reference: str | None = None,
    per_seed: Sequence[Mapping[str, object]] | pd.DataFrame = (),
    labels: Mapping[str, str] | None = None,
) -> Conclusion:
    """Compares every method with `reference` in each measure, and concludes about the first measure that has values.

    `answers` has a row for each method, seed and prompt, as for `refine_lab.statistics.answer_scores`. A measure that is
    not in it is taken from `per_seed`, which has a row for each method and seed. `reference`: a method; none: see
    `refine_lab.experiments.reference.default_reference`. `labels`: names of methods, if they are not those of the figures.
    Raises ValueError if no two methods have one of the measures, and ConfigError for an unknown reference.
    """
    measures = [measures] if isinstance(measures, str) else [*measures]
    rows, found = pd.DataFrame(per_seed), {}
    for measure in measures:
        if measure in answers and answers[measure].notna().any():
            scores = scores_by_item(answers, measure)
        elif measure in rows and rows[measure].notna().any():
            scores = scores_by_seed(rows, measure)
        else:
            continue
        if scores["method"].nunique() > 1:
            found[measure] = scores
    return conclude(found, reference=reference, labels=labels)


def conclude(
    scores: Mapping[str, pd.DataFrame],
    *,
    reference: str | None = None,
    labels: Mapping[str, str] | None = None,
    single: bool = False,
    wanted: Sequence[str] = (),
) -> Conclusion:
    """Returns the conclusion of tables of scores by measure; see `conclusion`.

    Each table has the columns `refine_lab.statistics.contrasts.SCORE_COLUMNS`. `single`: whether its methods are single runs.
    `wanted`: further methods, which are named also if they have no scores.
    """
    require_data("conclusion", len(scores) > 0, "no two methods have one of these measures")
    methods = [*dict.fromkeys(name for table in scores.values() for name in table["method"])]
    against = default_reference(methods) if reference is None else reference
    methods = [*dict.fromkeys([*methods, *wanted])]
    named = dict(labels or {}) or {name: style.label for name, style in method_styles(methods).items()}
    tables = {
        measure: differences_from(table, against) for measure, table in scores.items() if against in {*table["method"]}
    }
    if not tables:
        raise unknown("reference", against, methods)
    tables = {measure: _bounded(measure, table) for measure, table in tables.items()}
    first, differences = next(iter(tables.items()))
    absent = dict.fromkeys(methods, "scores") | not_compared(scores[first], against)
    absent = {name: lacks for name, lacks in absent.items() if name not in {against, *differences["method"]}}
    lines = [line for measure, table in tables.items() for line in _lines(measure, table, named)]
    items = differences["items"].max() if len(differences) else None
    note = few_items(int(items)) if items is not None and items > 1 else ""
    tests = max((int(table["p_holm"].notna().sum()) for table in tables.values()), default=0)
    corrected = f"The p-values are corrected by Holm for the {tests} comparisons of a measure." if tests > 1 else ""
    return Conclusion(
        pd.DataFrame(lines),
        f"Differences from {named[against]} [95 % intervals]",
        sentence=sentence_of(first, differences, against, named, absent, single=single),
        note=" ".join(filter(None, (note, corrected))),
    )


def _bounded(measure: str, table: pd.DataFrame) -> pd.DataFrame:
    """Returns the differences with the ends of an interval inside the possible range: shares differ by at most 100 points."""
    if measure_of(measure).unit != "%":
        return table
    return table.assign(low=table["low"].clip(lower=-1), high=table["high"].clip(upper=1))


def _lines(measure: str, table: pd.DataFrame, named: Mapping[str, str]) -> list[dict[str, object]]:
    return [
        {
            "measure": heading(measure),
            "method": named[row["method"]],
            named[row["against"]]: format_value(measure, row["against_value"], ()),
            "value": format_value(measure, row["value"], ()),
            "difference": format_value(measure, row["difference"], (row["low"], row["high"]), signed=True),
            "p (Holm)": format_p(row["p_holm"]),
            "interval over": "none" if row["over"] == "nothing" else row["over"].replace("items", "questions"),
            "seeds": row["seeds"],
            ITEMS: row["items"] if row["items"] > 1 else "–",
        }
        for row in table.to_dict("records")
    ]


# -- the sentence ------------------------------------------------------------------------------------------------------


def sentence_of(
    measure: str,
    table: pd.DataFrame,
    reference: str,
    named: Mapping[str, str],
    absent: Mapping[str, str],
    *,
    single: bool = False,
) -> str:
    """Returns one sentence about a measure's differences from the reference, with their intervals and what they leave open.

    Another sentence names the methods that are not compared and why: `absent` maps each to what it lacks, as from
    `refine_lab.experiments.reference.not_compared`, or `scores`.
    """
    label = measure_of(measure).label
    rows: list[dict[str, Any]] = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    if not rows:
        return " ".join(
            [f"In {label}, nothing is compared with {named[reference]}.", *_absent(absent, named, reference)]
        )
    ordered = sorted(rows, key=lambda row: (_rank(row), -abs(row["difference"])))
    parts = [_part(measure, row, named[row["method"]]) for row in ordered]
    value = format_value(measure, rows[0]["against_value"], ()).replace("-", "−")
    unit = f" {unit}" if (unit := measure_of(measure).unit) else ""
    head = f"Compared with {named[reference]} ({value}{unit}) in {label}"
    whole = f"{head}, {'; '.join(parts)}; {_limits(measure, rows, single)}."
    return " ".join([whole, *_absent(absent, named, reference)])


def _absent(absent: Mapping[str, str], named: Mapping[str, str], reference: str) -> list[str]:
    """Returns a sentence for each reason why methods are not compared."""
    common = f"in common with {named[reference]}"
    found = []
    for lacks in dict.fromkeys(absent.values()):
        names = [named[name] for name, reason in absent.items() if reason == lacks]
        one = len(names) == 1
        it, are = ("it has", "is") if one else ("they have", "are")
        reasons = {
            "seed": f"{it} no seed {common}",
            "question": f"{it} no question {common}",
            "count": f"{it} no question with as many scores as {named[reference]} at every seed",
            "scores": f"{it} no comparable scores in this measure",
        }
        subject = names[0] if one else f"{', '.join(names[:-1])} and {names[-1]}"
        found.append(f"{subject} {are} not compared: {reasons[lacks]}.")
    return found


def _rank(row: Mapping[str, Any]) -> int:
    """Orders differences: with an interval without 0, with one that contains 0, without one."""
    if not np.isfinite(row["low"]):
        return 2
    return int(row["low"] <= 0 <= row["high"])


def _part(measure: str, row: Mapping[str, Any], name: str) -> str:
    """Returns the difference of one method with its interval."""
    settings = measure_of(measure)
    points = "points" if settings.unit == "%" else settings.unit
    unit = f" {points}" if points else ""

    def number(value: float, sign: str = "+") -> str:
        return f"{value * settings.scale:{sign}.{settings.digits}f}".replace("-", "−")

    change, rank = row["difference"], _rank(row)
    if rank == 2:
        return f"{name} differs by {number(change)}{unit} (no interval)"
    interval = f"95 % interval {number(row['low'])} to {number(row['high'])}"
    if rank == 1:
        return f"{name} is not shown to differ ({number(change)}{unit}; {interval})"
    return f"{name} is {_word(measure, change)} by {number(abs(change), '')}{unit} ({interval})"


def _word(measure: str, change: float) -> str:
    """Returns what a difference in this direction means."""
    if "entropy" in measure:
        return "higher" if change > 0 else "lower"
    lower_is_better = "loss" in measure or "ppl" in measure
    return "better" if (change < 0) == lower_is_better else "worse"


def _limits(measure: str, rows: Sequence[Mapping[str, Any]], single: bool) -> str:
    """Returns why an interval is missing, and what the differences do not say."""
    over, seeds = {row["over"] for row in rows}, min(row["seeds"] for row in rows)
    items = max(row["items"] for row in rows)
    reasons, open_ends = [], []
    if "nothing" in over:
        reasons.append(_no_interval(seeds, items, single))
        open_ends.append("whether a difference without an interval is more than chance")
    if "items" in over:
        runs = "single runs are compared" if single else "there is one"
        open_ends.append(f"what another seed would give, since {runs} and the interval is over questions alone")
    if "seeds" in over:
        open_ends.append("what other held-out text would give, since no scores of single questions are recorded")
    if "seeds and items" in over and seeds < FEW_SEEDS:
        open_ends.append("how much seeds vary, which two of them show only roughly")
    if any(_rank(row) == 1 for row in rows):
        open_ends.append("that methods without a shown difference are equal")
    if measure in ADAPTED:
        open_ends.append("that unseen text is predicted better, since it is measured on the text adapted to")
    if not open_ends:
        open_ends.append("whether this also holds for other models, text and training lengths")
    return "; ".join([*reasons, f"this does not say {', nor '.join(open_ends)}"])


def _no_interval(seeds: int, items: int, single: bool) -> str:
    """Returns why there is no interval."""
    if items > 1:
        return "an interval is missing where all scores differ by the same amount or not at all"
    if seeds >= FEWEST_SEEDS:
        return "there is no interval because all seeds differ by the same amount"
    count = (
        "single runs are compared" if single else "there is one seed" if seeds == 1 else f"there are only {seeds} seeds"
    )
    return f"there is no interval because {count} and no scores of single questions are recorded"
