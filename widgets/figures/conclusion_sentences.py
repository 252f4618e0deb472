"""The sentences above differences from a reference: which method is best and by how much, and what that leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from refine_lab.experiments.reference import FEWEST_SEEDS, differences_from
from refine_lab.statistics.means import CONFIDENCE
from widgets.figures.method_tables import digits_of, format_value, measure_of, shown_difference

ADAPTED = ("loss_before", "loss_after", "entropy_before", "entropy_after")
"""Measures of the text to which a model was adapted."""
FEW_SEEDS = 3
"""Number of seeds below which a conclusion says that the variation between seeds is known only roughly."""

SECOND = "the second, "
"""Words before the second best method."""

Row = dict[str, Any]


def bounded(measure: str, table: pd.DataFrame) -> pd.DataFrame:
    """Returns the differences with the ends of an interval inside the possible range: shares differ by at most 100 points."""
    if measure_of(measure).unit != "%":
        return table
    return table.assign(low=table["low"].clip(lower=-1), high=table["high"].clip(upper=1))


def sentences_of(
    measure: str,
    scores: pd.DataFrame,
    table: pd.DataFrame,
    reference: str,
    named: Mapping[str, str],
    absent: Mapping[str, str],
    *,
    single: bool = False,
) -> tuple[str, str]:
    """Returns one sentence about the best method of a measure, and further ones about the others and what is left open.

    `table` has the differences from the reference, as from `differences_from(scores, reference)`. The first sentence has
    the best method's differences from the reference and from the second best, with their intervals. `absent` maps each
    method that is not compared to what it lacks, as from `refine_lab.experiments.reference.not_compared`, or `scores`.
    """
    digits = {"digits": digits_of(measure, table)}
    rows: list[Row] = [{str(name): value for name, value in row.items()} | digits for row in table.to_dict("records")]
    left = _absent(absent, named, reference)
    if not rows:
        return f"In {measure_of(measure).label}, nothing is compared with {named[reference]}.", " ".join(left)
    best, second, pair = best_and_second(measure, scores, rows, reference)
    pair = None if pair is None else pair | digits
    said = [
        row for row in rows if pair is None or row["method"] not in {best} | ({second} if best == reference else set())
    ]
    even = len({row["against_value"] for row in rows}) == 1
    others = [_part(measure, row, named[row["method"]], even) for row in sorted(said, key=_order)]
    value = f" ({_value(measure, rows[0], 'against_value')})" if even else ""
    unclaimed = ""
    compared = [f"Compared with {named[reference]}{value}, {'; '.join(others)}."] if others else []
    if pair is None:
        which = "the order depends on the seeds and questions that two of them share"
        head = f"In {measure_of(measure).label}, no method is best: {which}."
    else:
        claims = [*(row for row in rows if row["method"] == best and second != reference), pair]
        unclaimed = _unclaimed(measure, claims, named, single)
        head = unclaimed or _head(measure, rows, claims, second, reference, named)
    limits = _limits(measure, rows, pair, named, single, explained=bool(unclaimed))
    return head, " ".join([*compared, *limits, *left])


def best_and_second(
    measure: str, scores: pd.DataFrame, rows: Sequence[Row], reference: str
) -> tuple[str, str, Row | None]:
    """Returns the two methods with the best differences from the reference, and the row of the best minus the second.

    The row's `p_holm` is that of `rows` if one of the two is the reference. Otherwise it is corrected for the number of all
    pairs of methods, from which this one is chosen by the scores.
    There is no row if the two have no scores in common, or if the second is better where they have.
    """
    sign = -1 if _lower_is_better(measure) else 1
    gains = {reference: 0.0} | {row["method"]: sign * row["difference"] for row in rows}
    best, second = sorted(gains, key=lambda name: -gains[name])[:2]
    both = scores[scores["method"].isin([best, second])]
    found = bounded(measure, differences_from(both, second)).to_dict("records")
    if not found or sign * found[0]["difference"] < 0:
        return best, second, None
    pair = {str(name): value for name, value in found[0].items()}
    corrected = {row["method"]: row["p_holm"] for row in rows}
    pairs = len(gains) * (len(gains) - 1) / 2
    pair["p_holm"] = next(
        (corrected[name] for name in (best, second) if reference in (best, second) and name in corrected),
        min(1.0, pairs * pair["p_holm"]),
    )
    return best, second, pair


def _head(
    measure: str, rows: Sequence[Row], claims: Sequence[Row], second: str, reference: str, named: Mapping[str, str]
) -> str:
    """Returns the sentence about the best method: its mean, and its differences from the reference and the second.

    `claims`: its difference from the reference, unless that is the second best, and then that from the second best.
    """
    *own, pair = claims
    best = pair["method"]
    even = all(row["value"] == pair["value"] for row in own)
    shown = all(_rank(row) == 0 for row in [*own, pair])
    value = f" ({_value(measure, pair)})" if even else ""
    name, other = named[best], named[second]
    which = "highest" if "entropy" in measure else "best"
    if pair["difference"] == 0:
        which = f"{which} " if any(_rank(row) < 2 for row in claims) else ""
        head = f"{name} and {other} have the same {which}mean{value}"
        clauses = [_clause(measure, row, named[reference], even) for row in own]
    else:
        head = f"{name} {'is best' if shown and which == 'best' else f'has the {which} mean'}{value}"
        the_second = f"{SECOND}{other}" if len(rows) > 1 else other
        clauses = [_clause(measure, row, named[reference], even) for row in own]
        clauses.append(_clause(measure, pair, the_second, even))
    text = f"In {measure_of(measure).label}, {head}" + (f": {', and '.join(clauses)}" if clauses else "")
    return f"{text}."


def _unclaimed(measure: str, claims: Sequence[Row], named: Mapping[str, str], single: bool) -> str:
    """Returns the sentence that no difference can be claimed and why, then the numbers; empty if one has an interval.

    It is empty too if all differences are 0.
    """
    if any(_rank(row) < 2 for row in claims) or all(row["difference"] == 0 for row in claims):
        return ""
    parts = [
        f"{named[row['method']]} minus {named[row['against']]} is {_change(measure, row)} "
        f"({_value(measure, row)} against {_value(measure, row, 'against_value')})"
        for row in claims
    ]
    reason = _no_interval(min(row["seeds"] for row in claims), max(row["items"] for row in claims), single)
    return f"In {measure_of(measure).label}, no difference can be claimed, because {reason}: {', and '.join(parts)}."


def _clause(measure: str, row: Row, other: str, even: bool) -> str:
    """Returns how the best method differs from another one."""
    values = _value(measure, row, "against_value")
    if not even:  # other seeds or questions are compared in the other clause
        values = f"{_value(measure, row)} against {values} at the seeds and questions of both"
    interval = _interval(measure, row)
    rank = _rank(row)
    if row["difference"] == 0:
        return f"equal to {other}"
    comma = "," if other.startswith(SECOND) else ""
    if rank:
        return f"not shown to differ from {other} ({values}; {_change(measure, row)}, {interval})"
    change = _change(measure, row, size=True)
    return f"{_word(measure, row['difference'])} than {other} ({values}){comma} by {change} ({interval})"


def _part(measure: str, row: Row, name: str, even: bool) -> str:
    """Returns the difference of one method from the reference, with its interval."""
    values = "" if even else f"{_value(measure, row)} against {_value(measure, row, 'against_value')}; "
    if _rank(row):
        return f"{name} is not shown to differ ({values}{_change(measure, row)}; {_interval(measure, row)})"
    change = _change(measure, row, size=True)
    return f"{name} is {_word(measure, row['difference'])} by {change} ({values}{_interval(measure, row)})"


# -- what is left open -------------------------------------------------------------------------------------------------


def _limits(
    measure: str, rows: Sequence[Row], pair: Row | None, named: Mapping[str, str], single: bool, *, explained: bool
) -> list[str]:
    """Returns a sentence for each thing that the differences leave open; methods are named where it holds only for some.

    `explained`: whether the first sentence says already why there is no interval.
    """

    def about(chosen: Sequence[Row]) -> str:
        if len(chosen) < len(rows):
            return f"For {joined([named[row['method']] for row in chosen])}: "
        alike = pair is None or (pair["over"], pair["seeds"]) in {(row["over"], row["seeds"]) for row in rows}
        return "" if alike else f"In the differences from {named[rows[0]['against']]}: "

    found = []
    none = [row for row in rows if row["over"] == "nothing"]
    if none and not (explained and len(none) == len(rows)):
        reason = _no_interval(min(row["seeds"] for row in none), max(row["items"] for row in none), single)
        found.append(f"{about(none)}there is no interval because {reason}, so a difference may be chance.")
    if items := [row for row in rows if row["over"] == "items"]:
        runs = "single runs are compared" if single else "there is one seed"
        found.append(
            f"{about(items)}{runs}, and the interval is over questions alone; another seed may give another result."
        )
    if any(row["over"] == "seeds" for row in rows):
        found.append("Scores of single questions are not recorded; other held-out text may give another result.")
    if few := [row for row in rows if row["over"] == "seeds and items" and row["seeds"] < FEW_SEEDS]:
        found.append(f"{about(few)}there are only two seeds, so the variation between seeds is known only roughly.")
    if any(_rank(row) and row["difference"] for row in [*rows, *([pair] if pair else [])]):
        found.append("Methods that are not shown to differ need not be equal.")
    if any(_rank(row) == 1 and not row["low"] <= 0 <= row["high"] for row in [*rows, *([pair] if pair else [])]):
        found.append(
            "An interval is of one comparison alone; a difference counts as shown only if its p-value, corrected for the "
            f"number of comparisons, is below {1 - CONFIDENCE:.2g}."
        )
    if pair is not None and len(rows) > 1 and not explained:
        found.append(
            "The best two were picked by the same scores that compare them, and the interval does not allow for this: a narrow "
            "lead may be chance."
        )
    if measure in ADAPTED:
        found.append("This is measured on the text adapted to, and says nothing about unseen text.")
    if not found:
        found.append("Other models, texts and training lengths may give other results.")
    return [text[0].upper() + text[1:] for text in found]


def _no_interval(seeds: int, items: int, single: bool) -> str:
    """Returns why there is no interval, as the end of a sentence."""
    if items > 1:
        return "all scores differ by the same amount or not at all"
    if seeds >= FEWEST_SEEDS:
        return "all seeds differ by the same amount"
    count = (
        "single runs are compared" if single else "there is one seed" if seeds == 1 else f"there are only {seeds} seeds"
    )
    return f"{count} and no scores of single questions are recorded"


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
        found.append(f"{joined(names)} {are} not compared: {reasons[lacks]}.")
    return found


# -- words and numbers -------------------------------------------------------------------------------------------------


def joined(names: Sequence[str]) -> str:
    """Returns names with commas, and "and" before the last."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _order(row: Row) -> tuple[int, float]:
    return _rank(row), -abs(row["difference"])


def _rank(row: Row) -> int:
    """Orders differences: 0 for those that are shown, 1 for others with an interval, 2 for those without one.

    A difference is shown if its interval lies on one side of 0 and its p-value, corrected for the number of comparisons,
    is below 0.05.
    """
    if not np.isfinite(row["low"]):
        return 2
    return int(row["low"] <= 0 <= row["high"] or not row["p_holm"] < 1 - CONFIDENCE)


def _lower_is_better(measure: str) -> bool:
    return "loss" in measure or "ppl" in measure


def _word(measure: str, change: float) -> str:
    """Returns what a difference in this direction means."""
    if "entropy" in measure:
        return "higher" if change > 0 else "lower"
    return "better" if (change < 0) == _lower_is_better(measure) else "worse"


def _number(measure: str, row: Row, value: float) -> str:
    return f"{value * measure_of(measure).scale:+.{row['digits']}f}".replace("-", "−")


def _interval(measure: str, row: Row) -> str:
    if not np.isfinite(row["low"]):
        return "no interval"
    return f"95 % interval {_number(measure, row, row['low'])} to {_number(measure, row, row['high'])}"


def _change(measure: str, row: Row, *, size: bool = False) -> str:
    """Returns a difference with its unit, as the shown values have it; `size`: without its sign."""
    change = shown_difference(measure, row["value"], row["against_value"], row["digits"])
    return _number(measure, row, abs(change) if size else change).lstrip("+" if size else "") + _unit(measure)


def _unit(measure: str) -> str:
    """Returns the unit of a difference, after a space."""
    unit = measure_of(measure).unit
    return " points" if unit == "%" else f" {unit}" if unit else ""


def _value(measure: str, row: Row, name: str = "value") -> str:
    """Returns a mean with its unit."""
    unit = measure_of(measure).unit
    return format_value(measure, row[name], (), digits=row["digits"]) + (f" {unit}" if unit else "")
