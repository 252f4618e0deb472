"""Pairs of rollouts from the same prefix: two models with the same random numbers, or two recorded steps of training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from refine_lab.runs.run import Run
from refine_lab.validation import require

KEYS = ["position", "prefix", "target", "sample_index", "occurrence"]
"""What two rollouts of a pair have in common; `occurrence` numbers rollouts that agree in all the others."""
NUMBERS = ("reward", "binary", "logprob")
"""The numbers of a rollout that a pair holds of both sides; `logprob` is the sum over its tokens."""


def pair_rollouts(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Returns the rollouts of two frames that begin at the same prefix, in pairs with the same sample index.

    `a` and `b` have the columns of a run's rollouts (`runs.schema.COLUMNS`). Two prefixes are the same if their position,
    their recorded last tokens and the reference after them agree. Sequence ids are not compared, since a run gives a text
    that it reads again another id.

    Each row has `position`, `sample_index`, `prefix_ids` and `target_ids`, and with the endings `_a` and `_b` the columns
    `step`, `sequence_id`, `rollout_ids` and `NUMBERS`. `changed` marks the tokens in which the two rollouts differ, a list
    as long as the longer one, and `same` is how many tokens precede the first of them.
    """
    shared = ["position", "sample_index", "prefix_ids", "target_ids"]
    pairs = _keyed(a).merge(_keyed(b).drop(columns=shared[2:]), on=KEYS, how="inner", suffixes=("_a", "_b"))
    rows = zip(pairs["rollout_ids_a"], pairs["rollout_ids_b"], strict=True)
    changed = [_changed([*map(int, one)], [*map(int, other)]) for one, other in rows]
    pairs["changed"] = pd.Series(changed, dtype=object)
    pairs["same"] = [row.index(True) if True in row else len(row) for row in changed]
    sides = ("step", "sequence_id", "rollout_ids", *NUMBERS)
    named = [f"{name}_{side}" for side in ("a", "b") for name in sides]
    order = pairs.sort_values(["sequence_id_a", "position", "sample_index"], kind="stable")
    return order[[*shared, *named, "changed", "same"]].reset_index(drop=True)


def recorded_pairs(run: Run, step: int, other_step: int, other: Run | None = None) -> pd.DataFrame:
    """Returns `pair_rollouts` of the recorded rollouts of two steps of a run, or of one step of a run and one of another.

    Raises ValueError if a step has no recorded rollouts, and if the two have no prefix in common, as is usual for two
    steps of a run that reads each text once.
    """
    other = run if other is None else other
    found = []
    for source, number in ((run, step), (other, other_step)):
        frame = source.rollouts([number])
        require(len(frame) > 0, f"a step of {source.name}", number, _recorded(source))
        found.append(frame)
    pairs = pair_rollouts(*found)
    if pairs.empty:
        raise ValueError(
            f"step {step} of {run.name} and step {other_step} of {other.name} rolled out from different prefixes, so no "
            "rollouts can be paired: enter the two checkpoints as A and B instead, or the same step of two runs"
        )
    return pairs


def _recorded(run: Run) -> str:
    """Returns which steps have rollouts, for an error."""
    steps = run.rollouts()["step"]
    return (
        f"one with recorded rollouts, from {steps.min()} to {steps.max()}"
        if len(steps)
        else "none: it records no rollouts"
    )


def _keyed(rollouts: pd.DataFrame) -> pd.DataFrame:
    columns = ["step", "sequence_id", "position", "sample_index", "prefix_ids", "target_ids", "rollout_ids"]
    found = rollouts[[*columns, "reward", "binary"]].copy()
    found["logprob"] = [float(np.sum(row)) for row in rollouts["logprobs"]]
    for name in ("prefix", "target"):
        found[name] = found[f"{name}_ids"].map(tuple)
    found = found.sort_values(["sequence_id", "position", "sample_index"], kind="stable")
    return found.assign(occurrence=found.groupby(KEYS[:-1]).cumcount())


def _changed(one: list[int], other: list[int]) -> list[bool]:
    """Returns which tokens of the longer rollout are not those of the other."""
    least = min(len(one), len(other))
    return [x != y for x, y in zip(one, other, strict=False)] + [True] * (max(len(one), len(other)) - least)
