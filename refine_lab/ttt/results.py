"""What came of runs of test-time training: answers of several ways beside each other, means and intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from refine_lab.runs.run import Run
from refine_lab.statistics import mean_interval, paired_difference

SCORES = ("recall", "exact_match", "f1")
"""Of an answer beside its references, each from 0 to 1."""
ORDER = ("none", "sft_release", "sft", "refine")
"""Of the ways in a table of differences: each is compared with those before it."""
READINGS = ("loss_before", "loss_after", "entropy_before", "entropy_after")
"""Of the prompt, in nats a token."""


def results(runs: Sequence[Run]) -> pd.DataFrame:
    """The answers of several runs: a row an answer, `way` is the arm, told apart by its updates."""
    return pd.concat([run.answers() for run in runs], ignore_index=True)


def per_prompt(answers: pd.DataFrame) -> pd.DataFrame:
    """A row a way and prompt, the mean over seeds; of the prompts that every way has answered."""
    ways = answers["way"].nunique()
    shared = answers.groupby("name")["way"].nunique().eq(ways)
    kept = answers[answers["name"].map(shared)]
    return kept.groupby(["way", "name"], sort=False)[[*SCORES, *READINGS]].mean().reset_index()


def summary(answers: pd.DataFrame) -> pd.DataFrame:
    """A row a way: `prompts`, and of each measure the mean over prompts and its 95 % interval by Student's t.

    Columns `<measure>`, `<measure>_low`, `<measure>_high`; NaN as in `statistics.mean_interval`.
    """
    rows = []
    for way, group in per_prompt(answers).groupby("way", sort=False):
        row: dict[str, Any] = {"way": way, "prompts": len(group)}
        for measure in (*SCORES, *READINGS):
            values = group[measure].dropna().to_numpy()
            row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), mean_interval(values), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def differences(
    answers: pd.DataFrame, measures: Sequence[str] = (*SCORES, "loss_after", "entropy_after")
) -> pd.DataFrame:
    """A row a pair of ways and measure: `way` minus `against` on the same prompts, with its 95 % interval.

    Columns `way`, `against`, `measure`, `difference`, `low`, `high`, `pairs`; without measures that no prompt has.
    """
    prompts, rows = per_prompt(answers), []
    ways = [way for way in ORDER if way in set(prompts["way"])]
    for (against, way), measure in ((pair, m) for pair in combinations(ways, 2) for m in measures):
        known = prompts[prompts[measure].notna()]
        known = known[known.groupby("name")["way"].transform("nunique").eq(len(ways))]  # one way may have lost itself
        if len(known):
            found = paired_difference(known, way, against, measure, pair="name")
            rows.append({"way": way, "against": against, "measure": measure} | found)
    return pd.DataFrame(rows, columns=["way", "against", "measure", "difference", "low", "high", "pairs"])


def per_seed(answers: pd.DataFrame) -> pd.DataFrame:
    """A row a way and seed: `updates` on a prompt, and the mean of each score over the prompts that have references."""
    return answers.groupby(["way", "seed"], sort=False)[["updates", *SCORES]].mean().reset_index()
