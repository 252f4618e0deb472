"""Tables of scores by method, seed and item, from answers of post-training and test-time training and from evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from refine_lab.data.tasks.items import items_of
from refine_lab.data.tasks.scores import SCORES
from refine_lab.runs.files import read_parquet
from refine_lab.statistics.contrasts import SCORE_COLUMNS, check_columns
from refine_lab.validation import require, unknown

NO_SEED = -1
"""Represents the seed of a model before training."""


def answer_scores(answers: pd.DataFrame, measure: str = SCORES[0]) -> pd.DataFrame:
    """Returns the scores of answers as `method`, `seed`, `item`, `score`, for `compare_methods`.

    `answers` as from `experiments.posttrain.answer_test_prompts` or `experiments.compare.answers_of`. The item is the question
    (`data.tasks.items.items_of`). Prompts without the measure are left out. A model before training (seed -1) is the
    same for every seed: its rows are repeated for each seed of the other methods.
    """
    check_columns(answers, ("method", "seed", "question", "name", measure))
    table = answers.assign(item=items_of(answers), score=answers[measure])[[*SCORE_COLUMNS]].dropna(subset="score")
    base = table[table["seed"] == NO_SEED]
    seeds = sorted(set(table["seed"]) - {NO_SEED})
    repeated = [base.assign(seed=seed) for seed in seeds] or [base]
    return pd.concat([*repeated, table[table["seed"] != NO_SEED]], ignore_index=True)


def evaluation_scores(
    folders: Mapping[tuple[str, int], Path | str], task: str, length: int | None = None, measure: str | None = None
) -> pd.DataFrame:
    """Returns the scores of the samples of evaluations as `method`, `seed`, `item`, `score`, for `compare_methods`.

    `folders` maps each method and seed to the output folder of its evaluation. `measure` is a column of
    `samples/<task>-<length>.parquet`; None: the task's main metric. The item identifies a distinct sample different from others
    (`different_samples`). Raises ConfigError for an unknown task or measure, and FileNotFoundError for a task that a
    folder has no samples of.
    """
    from refine_lab.evaluation.catalogue import BENCHMARKS  # here, since it loads lm_eval

    if task not in BENCHMARKS:
        raise unknown("task", task, BENCHMARKS)
    require(len(folders) > 0, "folders", folders, "at least one")
    measure = measure or BENCHMARKS[task].main
    tables = []
    for (method, seed), folder in folders.items():
        rows = unit_samples(Path(folder), task, length)
        if rows is None:
            name = sample_file(task, length)
            raise FileNotFoundError(f"{str(folder)!r} has no samples of {task}: there is no file samples/{name}")
        if measure not in rows:
            raise unknown(f"measure of {task!r}", measure, rows.select_dtypes("number").columns)
        tables.append(
            pd.DataFrame({"method": method, "seed": seed, "item": sample_items(rows), "score": rows[measure]})
        )
    return pd.concat(tables, ignore_index=True).dropna(subset="score")


def sample_file(task: str, length: int | None) -> str:
    """Returns the name of the file with the samples of a task at a length."""
    return f"{task}.parquet" if length is None else f"{task}-{length}.parquet"


def unit_samples(folder: Path, task: str, length: int | None) -> pd.DataFrame | None:
    """Returns the samples of a task in the output folder of an evaluation, or None if it has none."""
    path = folder / "samples" / sample_file(task, length)
    return read_parquet(path).to_pandas() if path.is_file() else None


def sample_items(rows: pd.DataFrame) -> pd.Series:
    """Returns the item of each sample: its column `item`, or in files of earlier versions the prompt, document or number."""
    name = next(column for column in ("item", "prompt", "document", "sample") if column in rows)
    return rows[name].astype(str)
