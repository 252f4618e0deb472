"""Data frames of an evaluation's results: scores, tasks without a result, effective lengths, and answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from refine_lab.data.tasks.items import FEWEST_ITEMS
from refine_lab.evaluation.catalogue import BENCHMARKS, Unit


def score_frame(result: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the main metric of every evaluated unit with its standard error, counts, and how answers were decoded.

    `few` marks tasks with fewer than `FEWEST_ITEMS` distinct samples.
    """
    rows = [
        {
            "task": unit["task"],
            "length": unit["length"],
            "metric": unit["main"],
            "value": unit["metrics"][unit["main"]]["value"],
            "stderr": unit["metrics"][unit["main"]]["stderr"],
            "samples": unit["samples"],
            "distinct samples": unit["different_samples"],
            "few": unit["different_samples"] < FEWEST_ITEMS,
            "answers": result["answers"],
            "about": BENCHMARKS[unit["task"]].about,
        }
        for unit in result["units"]
        if unit["status"] == "done"
    ]
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


SCORE_COLUMNS = [
    *("task", "length", "metric", "value", "stderr", "samples", "distinct samples", "few", "answers", "about")
]


def few_samples(scores: pd.DataFrame) -> str:
    """Returns a sentence that names the tasks of a score frame with fewer than `FEWEST_ITEMS` distinct samples."""
    few = scores[scores["few"]]
    if few.empty:
        return ""
    counts = [
        f"{task} ({'' if pd.isna(length) else f'{length:.0f} tokens, '}{count})"
        for task, length, count in few[["task", "length", "distinct samples"]].itertuples(index=False)
    ]
    sentence = f"These tasks have fewer than {FEWEST_ITEMS} distinct samples, so small differences are mostly noise"
    return f"{sentence}: {', '.join(counts)}."


def metric_frame(result: Mapping[str, Any]) -> pd.DataFrame:
    """Returns all metrics of every evaluated unit, one row per metric."""
    return pd.DataFrame(
        [
            {"task": unit["task"], "length": unit["length"], "metric": name, **metric, "answers": result["answers"]}
            for unit in result["units"]
            if unit["status"] == "done"
            for name, metric in unit["metrics"].items()
        ],
        columns=["task", "length", "metric", "value", "stderr", "higher_is_better", "answers"],
    )


def gap_frame(result: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the units that could not run, each with the message that says what is missing."""
    rows = [
        {name: unit[name] for name in ("task", "length", "reason")}
        for unit in result["units"]
        if unit["status"] != "done"
    ]
    return pd.DataFrame(rows, columns=["task", "length", "reason"])


def length_frame(result: Mapping[str, Any]) -> pd.DataFrame:
    """Returns RULER's effective length and the length by NoLiMa's criterion of each task; none if no length reaches them."""
    lengths = result["figures"]
    rows = [
        {"task": task, "effective length": effective, "NoLiMa's rule": lengths["nolima_length"][task]}
        for task, effective in lengths["effective_length"].items()
    ]
    frame = pd.DataFrame(rows, columns=["task", "effective length", "NoLiMa's rule"]).assign(answers=result["answers"])
    return frame.astype({"effective length": "Int64", "NoLiMa's rule": "Int64"})


def fact_frame(result: Mapping[str, Any]) -> pd.DataFrame:
    """Returns where the samples of each unit come from, and how many prompts were cut, dropped or not adapted to."""
    rows = [
        {"task": unit["task"], "length": unit["length"], "fact": str(name), "value": str(value)}
        for unit in result["units"]
        for name, value in unit.get("facts", {}).items()
    ]
    return pd.DataFrame(rows, columns=["task", "length", "fact", "value"])


def answer_frame(out: Path, result: Mapping[str, Any], count: int = 2) -> pd.DataFrame:
    """Returns the first `count` answers of each task that has any, with their references and scores."""
    frames = []
    for unit in result["units"]:
        path = out / "samples" / f"{Unit(unit['task'], unit['length']).name}.parquet"
        if unit["status"] != "done" or not path.is_file():
            continue
        rows = pd.read_parquet(path).head(count)
        if "answers" in rows and unit["main"] in rows:
            shown = pd.DataFrame({"task": unit["task"], "length": unit["length"]}, index=rows.index)
            shown["answer"] = rows["answers"].str[0]
            shown["references"] = rows["references"].str.join(" | ")
            frames.append(shown.assign(score=rows[unit["main"]]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=ANSWER_COLUMNS)


ANSWER_COLUMNS = ["task", "length", "answer", "references", "score"]
