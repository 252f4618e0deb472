"""Tables over seeds, of post-training and test-time training: the ways, what one has more than another, their answers."""

from __future__ import annotations

import math

import pandas as pd

from refine_lab.statistics import by_way, paired_difference
from widgets.series import way_styles
from widgets.tables import Table, visible

MEASURES = {"recall": "recall (%)", "exact_match": "exact match (%)", "f1": "F1 (%)"}
COMPARED = (
    *(("nested_refine", "sft"), ("nested_refine", "nested_sft"), ("nested_refine", "nested_sft_release")),
    ("nested_sft", "sft"),
    *(("refine", "none"), ("refine", "sft"), ("refine", "sft_release"), ("sft", "none"), ("sft_release", "none")),
)
"""Pairs of ways whose difference is shown, where both were run with the same seeds."""


def ways_table(results: pd.DataFrame) -> Table:
    """Mean ± standard deviation over seeds of every measure, and mean number of updates, a row a way.

    `results`: a row a way and seed, with `way`, `seed`, `updates` and the measures as shares. Raises ValueError for no rows.
    """
    _require("ways_table", results)
    measured = _measured(results)
    rows, labels = [], way_styles(results["way"])
    for row in by_way(results, [*measured, "updates"]).to_dict("records"):
        shown = {MEASURES[name]: _percent(row[name], row[f"{name}_std"]) for name in measured}
        rows.append(
            {"method": labels[str(row["way"])].label, "updates": f"{row['updates']:.4g}", "runs": row["seeds"], **shown}
        )
    return Table(pd.DataFrame(rows), "Test questions: mean ± standard deviation over seeds")


def differences_table(results: pd.DataFrame) -> Table:
    """What one way has more than another, in points, mean over seeds with its 95 % interval (Student's t, paired).

    `results` as for `ways_table`. Raises ValueError where no two ways can be compared.
    """
    _require("differences_table", results)
    seeds = {way: sorted(group["seed"]) for way, group in results.groupby("way")}
    rows = []
    for way, against in COMPARED:
        if way in seeds and seeds[way] == seeds.get(against):
            labels = way_styles([way, against])
            row: dict[str, object] = {"difference": f"{labels[way].label} – {labels[against].label}"}
            row["seeds"] = len(seeds[way])
            for name in _measured(results):
                row[MEASURES[name].replace("%", "points")] = _interval(paired_difference(results, way, against, name))
            rows.append(row)
    if not rows:
        raise ValueError("figure differences_table has no data: it compares ways that were run with the same seeds")
    return Table(pd.DataFrame(rows), "Paired differences over seeds, with 95 % intervals")


def samples_table(samples: pd.DataFrame) -> Table:
    """Questions with the answers of all ways. `samples`: of `tasks.answers.side_by_side`. Raises ValueError for no rows."""
    _require("samples_table", samples)
    ways = [str(name) for name in samples if name not in ("question", "references")]
    named = {way: style.label for way, style in way_styles(ways).items()}
    table = samples.map(lambda text: visible(str(text)) or "–").rename(columns=named)
    return Table(
        table, "Answers side by side, differing answers first", monospace=["question", "references", *named.values()]
    )


def _measured(results: pd.DataFrame) -> list[str]:
    """The measures that there are: none of them where the questions have no reference answers."""
    return [name for name in MEASURES if name in results and results[name].notna().any()]


def _percent(mean: float, spread: float) -> str:
    return f"{100 * mean:.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def _interval(found: dict[str, float]) -> str:
    mean, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    return f"{mean:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def _require(name: str, frame: pd.DataFrame) -> None:
    if frame.empty:
        raise ValueError(f"figure {name} has no data: there are no rows")
