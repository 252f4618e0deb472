"""Differences of methods, or of single runs, from one reference, paired over the seeds and items that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from refine_lab.experiments.run_groups import SEPARATOR
from refine_lab.statistics.contrasts import SCORE_COLUMNS, check_columns, compare_methods, paired_cells
from refine_lab.statistics.crossed import linearised, over_seeds
from refine_lab.statistics.estimate import Estimate, undetermined
from refine_lab.statistics.holm import holm
from refine_lab.statistics.scores import NO_SEED, answer_scores
from refine_lab.validation import unknown

Over = Literal["seeds and items", "items", "seeds", "nothing"]
"""The units over which an interval is taken."""

FEWEST_SEEDS = 3
"""Minimum number of seeds of an interval over seeds alone: with two, Student's t has one degree of freedom."""

PREFERRED = ("nested_sft", "sft", "none", "base")
"""Methods that are the reference if none is chosen, in this order."""

WHOLE = "all items"
"""The only item of a score that was recorded for all items together."""


def scores_by_item(answers: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns the scores of answers as `statistics.answer_scores`, without prompts for which a method lacks the measure.

    Several answers of a method to one question with the same seed, such as those of repeated runs, are averaged.
    """
    complete = answers[answers[measure].notna().groupby(answers["name"]).transform("all")]
    if complete.empty:
        return pd.DataFrame(columns=list(SCORE_COLUMNS))
    keys = ["method", "seed", "name", "question"]
    averaged = complete.groupby(keys, sort=False, dropna=False)[[measure]].mean()
    return answer_scores(averaged.reset_index(), measure)


def scores_by_seed(rows: pd.DataFrame | Sequence[Mapping[str, object]], measure: str) -> pd.DataFrame:
    """Returns the scores of rows with `method`, `seed` and the measure, one per method and seed, with a single item.

    Several rows of a method and seed, such as those of repeated runs, are averaged. A model before training has no seed;
    it is repeated for each seed of the other methods.
    """
    table = pd.DataFrame(rows)[["method", "seed", measure]].rename(columns={measure: "score"}).dropna(subset="score")
    table = table.assign(seed=table["seed"].fillna(NO_SEED).astype(int), item=WHOLE)
    table = table.groupby(["method", "seed", "item"], sort=False, as_index=False)["score"].mean()
    seeds = sorted({*table["seed"]} - {NO_SEED})
    base = table[table["seed"] == NO_SEED]
    repeated = [base.assign(seed=seed) for seed in seeds] or [base]
    return pd.concat([*repeated, table[table["seed"] != NO_SEED]], ignore_index=True)[[*SCORE_COLUMNS]]


def default_reference(methods: Sequence[str]) -> str:
    """Returns the method with which the others are compared: the first of `PREFERRED` that is there, else the first one."""
    found = {name.partition(SEPARATOR)[0]: name for name in reversed(methods)}
    return next((found[name] for name in PREFERRED if name in found), methods[0])


def differences_from(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Returns a row for each other method with its paired difference from `reference`.

    `scores` has `statistics.contrasts.SCORE_COLUMNS`. Columns: `method`, `against`, `value` and `against_value` (means),
    `difference`, `low` and `high` (95 % interval, NaN if there is none), `p_holm`, `over` (see `Over`), and the counts
    `seeds`, `items` and `prompts`. A method is compared at the seeds and items that it shares with the reference;
    without any, it has no row (`not_compared`). A model without adaptation (`none`) that answered once counts for every seed.

    The interval is over seeds and items (`compare_methods`) where both are at least two. It is by Student's t over items
    for one seed, and over seeds for one item and at least `FEWEST_SEEDS` seeds.
    """
    check_columns(scores, SCORE_COLUMNS)
    methods = [*dict.fromkeys(scores["method"])]
    if reference not in methods:
        raise unknown("reference", reference, methods)
    pairs = ((name, _shared(scores, name, reference)) for name in methods if name != reference)
    rows = [_row(pair, name, reference) for name, pair in pairs if len(pair)]
    columns = ["method", "against", "value", "against_value", "difference", "low", "high", "p", "over"]
    table = pd.DataFrame(rows, columns=[*columns, "seeds", "items", "prompts"])
    return table.assign(p=holm(table["p"].to_numpy(float))).rename(columns={"p": "p_holm"})


def not_compared(scores: pd.DataFrame, reference: str) -> dict[str, str]:
    """Returns the methods that have no row in `differences_from`, each with what it lacks: `seed`, `question` or `count`.

    `seed` and `question`: it has none in common with the reference. `count`: no question that both were asked has the
    same number of scores at every seed.
    """
    found, against = {}, scores[scores["method"] == reference]
    for name in dict.fromkeys(scores["method"]):
        if name == reference or len(_shared(scores, name, reference)):
            continue
        one, other = _same_seeds(scores[scores["method"] == name], against, name, reference)
        shared = {*one["item"]} & {*other["item"]}
        found[name] = "seed" if one.empty else "count" if shared else "question"
    return found


def _shared(scores: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """Returns the scores of both methods at the seeds of both, for items with the same number of scores everywhere."""
    one, other = (scores[scores["method"] == name] for name in (method, against))
    both = pd.concat(_same_seeds(one, other, method, against))
    if both.empty:
        return both
    counts = both.groupby(["method", "seed", "item"]).size().unstack("item", fill_value=0)
    equal = counts.columns[(counts == counts.iloc[0]).all() & (counts.iloc[0] > 0)]
    return both[both["item"].isin(equal)].reset_index(drop=True)


def _same_seeds(one: pd.DataFrame, other: pd.DataFrame, method: str, against: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the scores of two methods at the seeds of both; a model without adaptation that answered once has all seeds."""
    if method.partition(SEPARATOR)[0] == "none" and one["seed"].nunique() == 1:
        one = pd.concat([one.assign(seed=seed) for seed in other["seed"].unique()])
    if against.partition(SEPARATOR)[0] == "none" and other["seed"].nunique() == 1:
        other = pd.concat([other.assign(seed=seed) for seed in one["seed"].unique()])
    seeds = {*one["seed"]} & {*other["seed"]}
    return one[one["seed"].isin(seeds)], other[other["seed"].isin(seeds)]


def _row(scores: pd.DataFrame, method: str, against: str) -> dict[str, object]:
    found = compare_methods(scores, [(method, against)]).iloc[0]
    ends, p, over = (found["low"], found["high"]), found["p"], "seeds and items"
    if not np.isfinite(found["low"]):
        estimate, over = _over_one(linearised(*paired_cells(scores, method, against)))
        ends, p = estimate.interval(), estimate.p_value
    means = scores.groupby("method")["score"].mean()
    return {
        "method": method,
        "against": against,
        "value": means[method],
        "against_value": means[against],
        "difference": found["difference"],
        "low": ends[0],
        "high": ends[1],
        "p": p,
        "over": over,
        **{name: int(found[name]) for name in ("seeds", "items", "prompts")},
    }


def _over_one(values: Float[np.ndarray, "S I"]) -> tuple[Estimate, Over]:
    """Returns the mean with its standard error over items, for one seed, or over seeds, for one item, by Student's t."""
    seeds, items = values.shape
    if seeds == 1 and items > 1:
        found, over = over_seeds(values.T), "items"
    elif items == 1 and seeds >= FEWEST_SEEDS:
        found, over = over_seeds(values), "seeds"
    else:
        return undetermined(float(values.mean())), "nothing"
    return found, over if np.isfinite(found.stderr) else "nothing"
